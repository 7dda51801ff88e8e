#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace spectral_fast {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
// Far more than needed: 3 to 10 after the QR, for r up to 256.
constexpr int kMaxSweeps = 30;
// A column shorter than this, where the largest entry is 1, counts as zero: products of two squares stay normal
// numbers.
constexpr double kTiny = 0x1p-200;

// Eight partial sums: the compiler may vectorise them without fast-math, and the order is fixed.
double dot(const double* x, const double* y, std::size_t n) {
  double sums[8] = {};
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (std::size_t k = 0; k < 8; ++k) sums[k] += x[i + k] * y[i + k];
  double tail = 0;
  for (; i < n; ++i) tail += x[i] * y[i];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])) + tail;
}

double square(const double* x, std::size_t n) { return dot(x, x, n); }

// y += alpha x
void axpy(double alpha, const double* __restrict x, double* __restrict y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] += alpha * x[i];
}

// (x, y) <- (c x - s y, s x + c y)
void rotate(double c, double s, double* __restrict x, double* __restrict y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const double xi = x[i], yi = y[i];
    x[i] = c * xi - s * yi;
    y[i] = s * xi + c * yi;
  }
}

// Storage is column-major throughout, so that every inner loop runs over contiguous memory.
class JacobiSvd {
 public:
  explicit JacobiSvd(std::size_t r) : r_(r), c_(r * r), g_(r * r), squares_(r), order_(r), pivot_(r) {}

  SvdStatus operator()(const double* m, double* wt, double* s) {
    double largest = 0;
    for (std::size_t i = 0; i < r_ * r_; ++i) {
      if (!std::isfinite(m[i])) return SvdStatus::not_finite;
      largest = std::max(largest, std::abs(m[i]));
    }
    // By a power of two: scaling then rounds nothing, and squares neither overflow nor underflow.
    const int exponent = largest > 0 ? std::ilogb(largest) : 0;
    for (std::size_t i = 0; i < r_ * r_; ++i) c_[i] = std::scalbn(m[i], -exponent);
    // Row-major M is column-major M^T, and M^T P = Q R gives M = P R^T Q^T. The columns of G = R^T are closer
    // to orthogonal than M's; once rotations V make them so, G V = U diag(s) and P U are M's left vectors.
    pivoted_qr();
    for (std::size_t i = 0; i < r_; ++i)
      for (std::size_t j = 0; j < r_; ++j) column(g_, i)[j] = j >= i ? column(c_, j)[i] : 0.0;
    const SvdStatus status = orthogonalise();
    for (std::size_t j = 0; j < r_; ++j) squares_[j] = square(column(g_, j), r_);
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    std::stable_sort(order_.begin(), order_.end(), [&](auto i, auto j) { return squares_[i] > squares_[j]; });
    for (std::size_t k = 0; k < r_; ++k) {
      const double length = std::sqrt(squares_[order_[k]]);
      const bool zero = length <= kTiny;
      s[k] = zero ? 0 : std::scalbn(length, exponent);
      for (std::size_t i = 0; i < r_; ++i) wt[k * r_ + pivot_[i]] = zero ? 0 : column(g_, order_[k])[i] / length;
    }
    return status;
  }

 private:
  double* column(std::vector<double>& matrix, std::size_t j) { return matrix.data() + j * r_; }

  // c_'s upper triangle <- R of C P = Q R, columns taken in order of decreasing remainder; Q is not kept.
  void pivoted_qr() {
    std::iota(pivot_.begin(), pivot_.end(), std::size_t{0});
    for (std::size_t j = 0; j < r_; ++j) squares_[j] = square(column(c_, j), r_);
    for (std::size_t k = 0; k + 1 < r_; ++k) {
      const auto best = std::max_element(squares_.begin() + k, squares_.end()) - squares_.begin();
      std::swap_ranges(column(c_, k), column(c_, k) + r_, column(c_, best));
      std::swap(squares_[k], squares_[best]);
      std::swap(pivot_[k], pivot_[best]);
      const double length = std::sqrt(squares_[k]);
      if (length <= kTiny) return;
      // x <- v with v[0] = 1, and (I - tau v v^T) x = beta e_1.
      double* x = column(c_, k) + k;
      const std::size_t n = r_ - k;
      const double beta = x[0] > 0 ? -length : length;
      const double tau = (beta - x[0]) / beta, scale = 1 / (x[0] - beta);
      for (std::size_t i = 1; i < n; ++i) x[i] *= scale;
      x[0] = 1;
      for (std::size_t j = k + 1; j < r_; ++j) {
        double* y = column(c_, j) + k;
        axpy(-tau * dot(x, y, n), x, y, n);
        squares_[j] = square(y + 1, n - 1);
      }
      x[0] = beta;
    }
  }

  // Rotates pairs of columns of G until all are orthogonal to rounding.
  SvdStatus orthogonalise() {
    // Squares are summed anew in each sweep, and only updated within it: what that loses costs no accuracy.
    const double tolerance = kEpsilon * kEpsilon * static_cast<double>(r_);
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      for (std::size_t j = 0; j < r_; ++j) squares_[j] = square(column(g_, j), r_);
      bool rotated = false;
      for (std::size_t i = 0; i + 1 < r_; ++i) {
        for (std::size_t j = i + 1; j < r_; ++j) {
          double *x = column(g_, i), *y = column(g_, j);
          const double d = dot(x, y, r_);
          if (!(d * d > tolerance * squares_[i] * squares_[j])) continue;
          rotated = true;
          const double zeta = (squares_[j] - squares_[i]) / (2 * d);
          const double t = std::copysign(1 / (std::abs(zeta) + std::sqrt(1 + zeta * zeta)), zeta);
          const double cosine = 1 / std::sqrt(1 + t * t);
          rotate(cosine, cosine * t, x, y, r_);
          squares_[i] -= t * d;
          squares_[j] += t * d;
        }
      }
      if (!rotated) return SvdStatus::converged;
    }
    return SvdStatus::not_converged;
  }

  std::size_t r_;
  std::vector<double> c_, g_, squares_;
  std::vector<std::size_t> order_, pivot_;
};

}  // namespace

void jacobi_svd(const double* m, double* wt, double* s, std::int32_t* status, std::int64_t count, std::int64_t r,
                int threads) {
  const auto size = static_cast<std::size_t>(r);
  parallel_for(count, threads, [&] {
    return [&, svd = JacobiSvd(size)](std::int64_t i) mutable {
      status[i] = static_cast<std::int32_t>(svd(m + i * r * r, wt + i * r * r, s + i * r));
    };
  });
}

}  // namespace spectral_fast

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace spectral_fast {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
// Sixty is never seen: a preconditioned matrix takes 3 to 8 sweeps.
constexpr int kMaxSweeps = 60;
// Below this (times the largest entry) a column's squared norm underflows: its direction is rebuilt instead.
constexpr double kTiny = 0x1p-480;

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

// The SVD of one matrix; all storage is column-major, so every inner loop runs over contiguous memory.
class JacobiSvd {
 public:
  explicit JacobiSvd(std::size_t r)
      : r_(r), c_(r * r), g_(r * r), q_(r * r), norms_(r), tau_(r), order_(r), pivot_(r) {}

  SvdStatus operator()(const double* m, double* wt, double* s, double* zt) {
    double largest = 0;
    for (std::size_t i = 0; i < r_ * r_; ++i) {
      if (!std::isfinite(m[i])) return SvdStatus::not_finite;
      largest = std::max(largest, std::abs(m[i]));
    }
    // A power of two, so that scaling rounds nothing and squares neither overflow nor underflow.
    const int exponent = largest > 0 ? std::ilogb(largest) : 0;
    // Row-major M is column-major M^T: C = M^T.
    for (std::size_t i = 0; i < r_ * r_; ++i) c_[i] = std::scalbn(m[i], -exponent);
    pivoted_qr();
    form_q();
    for (std::size_t i = 0; i < r_; ++i)  // G = R^T
      for (std::size_t j = 0; j < r_; ++j) g_[i * r_ + j] = j >= i ? c_[j * r_ + i] : 0.0;
    const SvdStatus status = orthogonalise();
    // M^T P = Q R = Q G^T and G V = X = U diag(s), with V folded into q_ on the way: M = (P U) diag(s) (Q
    // V)^T.
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    for (std::size_t j = 0; j < r_; ++j) norms_[j] = std::sqrt(dot(column(g_, j), column(g_, j), r_));
    std::stable_sort(order_.begin(), order_.end(), [&](auto i, auto j) { return norms_[i] > norms_[j]; });
    for (std::size_t k = 0; k < r_; ++k) {
      const std::size_t j = order_[k];
      const double* x = column(g_, j);
      double* left = wt + k * r_;
      if (norms_[j] > kTiny) {
        s[k] = std::scalbn(norms_[j], exponent);
        for (std::size_t i = 0; i < r_; ++i) left[pivot_[i]] = x[i] / norms_[j];
      } else {
        s[k] = 0;
        complete(wt, k);
      }
      std::copy_n(column(q_, j), r_, zt + k * r_);
    }
    return status;
  }

 private:
  double* column(std::vector<double>& matrix, std::size_t j) { return matrix.data() + j * r_; }

  // C P = Q R by Householder reflections, columns taken in order of decreasing remaining norm.
  void pivoted_qr() {
    std::iota(pivot_.begin(), pivot_.end(), std::size_t{0});
    for (std::size_t j = 0; j < r_; ++j) norms_[j] = dot(column(c_, j), column(c_, j), r_);
    for (std::size_t k = 0; k < r_; ++k) {
      const auto best =
          static_cast<std::size_t>(std::max_element(norms_.begin() + k, norms_.end()) - norms_.begin());
      if (best != k) {
        std::swap_ranges(column(c_, k), column(c_, k) + r_, column(c_, best));
        std::swap(norms_[k], norms_[best]);
        std::swap(pivot_[k], pivot_[best]);
      }
      double* x = column(c_, k) + k;
      const std::size_t n = r_ - k;
      const double length = std::sqrt(norms_[k]);
      tau_[k] = 0;
      if (n == 1 || length <= kTiny) continue;
      // x <- v with v[0] = 1, and (I - tau v v^T) x = beta e_1.
      const double beta = x[0] > 0 ? -length : length;
      tau_[k] = (beta - x[0]) / beta;
      const double scale = 1 / (x[0] - beta);
      for (std::size_t i = 1; i < n; ++i) x[i] *= scale;
      x[0] = 1;
      for (std::size_t j = k + 1; j < r_; ++j) {
        double* y = column(c_, j) + k;
        axpy(-tau_[k] * dot(x, y, n), x, y, n);
        norms_[j] = dot(y + 1, y + 1, n - 1);
      }
      x[0] = beta;
    }
  }

  // q_ <- the product of the reflections, last first, so that each touches only its trailing block.
  void form_q() {
    std::fill(q_.begin(), q_.end(), 0.0);
    for (std::size_t k = r_; k-- > 0;) {
      q_[k * r_ + k] = 1;
      if (tau_[k] == 0) continue;
      double* v = column(c_, k) + k;
      const double diagonal = std::exchange(v[0], 1.0);
      for (std::size_t j = k; j < r_; ++j) {
        double* y = column(q_, j) + k;
        axpy(-tau_[k] * dot(v, y, r_ - k), v, y, r_ - k);
      }
      v[0] = diagonal;
    }
  }

  // Rotates pairs of columns of G (and of q_ with them) until all are orthogonal to rounding.
  SvdStatus orthogonalise() {
    const double tolerance = kEpsilon * std::sqrt(static_cast<double>(r_));
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      for (std::size_t j = 0; j < r_; ++j) norms_[j] = dot(column(g_, j), column(g_, j), r_);
      bool rotated = false;
      for (std::size_t i = 0; i + 1 < r_; ++i) {
        for (std::size_t j = i + 1; j < r_; ++j) {
          double *x = column(g_, i), *y = column(g_, j);
          const double d = dot(x, y, r_);
          if (!(std::abs(d) > tolerance * std::sqrt(norms_[i]) * std::sqrt(norms_[j]))) continue;
          rotated = true;
          const double zeta = (norms_[j] - norms_[i]) / (2 * d);
          const double t = std::copysign(1 / (std::abs(zeta) + std::hypot(1.0, zeta)), zeta);
          const double cosine = 1 / std::sqrt(1 + t * t);
          rotate(cosine, cosine * t, x, y, r_);
          rotate(cosine, cosine * t, column(q_, i), column(q_, j), r_);
          norms_[i] = dot(x, x, r_);
          norms_[j] = dot(y, y, r_);
        }
      }
      if (!rotated) return SvdStatus::converged;
    }
    return SvdStatus::not_converged;
  }

  // Row k of wt <- a unit vector orthogonal to rows 0 .. k-1: the axis furthest from their span, twice
  // projected.
  void complete(double* wt, std::size_t k) {
    std::size_t axis = 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < r_; ++i) {
      double inside = 0;
      for (std::size_t j = 0; j < k; ++j) inside += wt[j * r_ + i] * wt[j * r_ + i];
      if (inside < least) least = inside, axis = i;
    }
    double* row = wt + k * r_;
    std::fill_n(row, r_, 0.0);
    row[axis] = 1;
    for (int pass = 0; pass < 2; ++pass)
      for (std::size_t j = 0; j < k; ++j) axpy(-dot(wt + j * r_, row, r_), wt + j * r_, row, r_);
    const double length = std::sqrt(dot(row, row, r_));
    for (std::size_t i = 0; i < r_; ++i) row[i] /= length;
  }

  std::size_t r_;
  std::vector<double> c_, g_, q_, norms_, tau_;
  std::vector<std::size_t> order_, pivot_;
};

}  // namespace

void jacobi_svd(const double* m, double* wt, double* s, double* zt, std::int32_t* status, std::int64_t count,
                std::int64_t r, int threads) {
  const auto size = static_cast<std::size_t>(r);
  parallel_for(count, threads, [&] {
    return [&, svd = JacobiSvd(size)](std::int64_t i) mutable {
      const std::size_t offset = static_cast<std::size_t>(i) * size * size;
      status[i] = static_cast<std::int32_t>(svd(m + offset, wt + offset, s + i * r, zt + offset));
    };
  });
}

}  // namespace spectral_fast

// One-sided Jacobi SVD of a small square matrix: rotations from the right until its columns are orthogonal. Their
// number falls with a good start: the eigenvectors of M^T M where M is well-conditioned, else a QR with column
// pivoting, which keeps small singular values apart from large ones' rounding. Drmac and Veselic, "New fast and
// accurate Jacobi SVD algorithm I", SIAM J. Matrix Anal. Appl. 29 (2008).

// Far more than needed: 2 to 10, for r up to 512.
constexpr int kMaxSweeps = 30;
// Smallest eigenvalue of M^T M, relative to the largest, for which its eigenvectors are a good start: singular values
// down to 1e-7 of the largest, which then keep nine digits.
constexpr double kWellConditioned = 1e-14;
// Pairs of columns that are rotated together: their dependent square roots and divisions overlap, and for r up to 256
// their columns stay in the first-level cache.
constexpr std::size_t kGroup = 8;

// Storage is column-major throughout, columns padded with zeros to whole vectors.
class JacobiSvd {
 public:
  SvdStatus operator()(const double* m, double* wt, double* s, std::size_t r) {
    r_ = r;
    ld_ = round_up(r, kDoubles);
    double largest = 0;
    bool finite = true;
    for (std::size_t i = 0; i < r * r; ++i) {
      finite &= std::isfinite(m[i]);
      largest = std::max(largest, std::abs(m[i]));
    }
    if (!finite) return SvdStatus::b_not_finite;
    c_ = c_buffer_.reserve((r + 1) * ld_);
    g_ = g_buffer_.reserve(r * ld_);
    squares_ = squares_buffer_.reserve(r);
    order_ = order_buffer_.reserve(r);
    pivot_ = pivot_buffer_.reserve(r);
    // By a power of two: scaling then rounds nothing, and squares neither overflow nor underflow.
    const int exponent = largest > 0 ? std::ilogb(largest) : 0;
    const double up = std::scalbn(1.0, -exponent / 2), rest = std::scalbn(1.0, -exponent + exponent / 2);
    for (std::size_t i = 0; i < r; ++i) {
      for (std::size_t j = 0; j < r; ++j) c_[i * ld_ + j] = m[i * r + j] * up * rest;
      std::fill(c_ + i * ld_ + r, c_ + (i + 1) * ld_, 0.0);
    }
    std::iota(pivot_, pivot_ + r, std::size_t{0});
    // Row-major M is column-major M^T, and M^T P = Q R gives M = P R^T Q^T: P times the left vectors of G = R^T are
    // M's.
    if (!start_from_eigenvectors()) pivoted_qr();
    const SvdStatus status = orthogonalise();
    for (std::size_t j = 0; j < r; ++j) squares_[j] = dot(column(g_, j), column(g_, j), ld_);
    std::iota(order_, order_ + r, std::size_t{0});
    std::stable_sort(order_, order_ + r, [&](auto i, auto j) { return squares_[i] > squares_[j]; });
    for (std::size_t k = 0; k < r; ++k) {
      const double length = std::sqrt(squares_[order_[k]]);
      const bool zero = length <= kTiny;
      s[k] = zero ? 0 : std::scalbn(length, exponent);
      for (std::size_t i = 0; i < r; ++i) wt[k * r + pivot_[i]] = zero ? 0 : column(g_, order_[k])[i] / length;
    }
    return r > 0 && !std::isfinite(s[0]) ? SvdStatus::not_converged : status;  // s may overflow where M does not
  }

 private:
  double* column(double* matrix, std::size_t j) const { return matrix + j * ld_; }

  // g_ <- M V for the eigenvectors V of M^T M, orthogonal but for the rounding of the product; false if M is too
  // ill-conditioned for that.
  bool start_from_eigenvectors() {
    double* s = s_buffer_.reserve(3 * r_ * ld_);
    double *vt = s + r_ * ld_, *mt = vt + r_ * ld_;
    multiply(c_, 1, ld_, c_, ld_, s, ld_, r_, r_, ld_, false);
    if (!eigen_(s, squares_, vt, r_, ld_)) return false;
    const auto [least, most] = std::minmax_element(squares_, squares_ + r_);
    if (r_ == 0 || !(*least > kWellConditioned * *most)) return false;
    std::fill(mt, mt + r_ * ld_, 0.0);
    transpose(c_, ld_, mt, ld_, r_);
    multiply(vt, ld_, 1, mt, ld_, g_, ld_, r_, r_, ld_, false);
    return true;
  }

  // g_ <- R^T of C P = Q R, columns taken in order of decreasing remainder; Q is not kept. What is left in c_ is zero
  // in the rows that are done, so whole vectors may be taken.
  void pivoted_qr() {
    double* v = column(c_, r_);
    std::fill(v, v + ld_, 0.0);
    std::fill(g_, g_ + r_ * ld_, 0.0);
    for (std::size_t j = 0; j < r_; ++j) squares_[j] = dot(column(c_, j), column(c_, j), ld_);
    for (std::size_t k = 0; k < r_; ++k) {
      const auto best = static_cast<std::size_t>(std::max_element(squares_ + k, squares_ + r_) - squares_);
      std::swap_ranges(column(c_, k), column(c_, k) + ld_, column(c_, best));
      std::swap(squares_[k], squares_[best]);
      std::swap(pivot_[k], pivot_[best]);
      for (std::size_t i = 0; i < k; ++i) std::swap(column(g_, i)[k], column(g_, i)[best]);
      const double length = std::sqrt(squares_[k]);
      if (length <= kTiny) return;
      std::copy(column(c_, k) + k, column(c_, k) + r_, v + k);
      const auto [tau, beta] = reflector(v, length, k, r_);
      const std::size_t first = k / kDoubles * kDoubles, rows = ld_ - first;
      column(g_, k)[k] = beta;
      for (std::size_t j = k + 1; j < r_; ++j) {
        double* y = column(c_, j);
        axpy(-tau * dot(v + first, y + first, rows), v + first, y + first, rows);
        column(g_, k)[j] = y[k];
        y[k] = 0;
        squares_[j] = dot(y + first, y + first, rows);  // anew: a difference would lose what little remains
      }
      v[k] = 0;
    }
  }

  // Rotates pairs of columns of G until all are orthogonal to rounding. The pairs (i, j) of a round have the same i +
  // j, and so no column in common; a sweep does the same as one row by row.
  SvdStatus orthogonalise() {
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      // Squares are summed anew in each sweep, and only updated within it: what that loses costs no accuracy.
      for (std::size_t j = 0; j < r_; ++j) squares_[j] = dot(column(g_, j), column(g_, j), ld_);
      bool rotated = false;
      for (std::size_t round = 1; round + 2 < 2 * r_; ++round) {
        const std::size_t begin = round < r_ ? 0 : round - r_ + 1, end = (round + 1) / 2;
        for (std::size_t i = begin; i < end; i += kGroup) rotated |= rotate_group(i, std::min(i + kGroup, end), round);
      }
      if (!rotated) return SvdStatus::converged;
    }
    return SvdStatus::not_converged;
  }

  // The pairs (i, round - i) for i from begin to end.
  bool rotate_group(std::size_t begin, std::size_t end, std::size_t round) {
    const double tolerance = kEpsilon * kEpsilon * static_cast<double>(r_);
    std::size_t left[kGroup], count = 0;
    double d[kGroup], gap[kGroup], tangent[kGroup], cosine[kGroup];
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t j = round - i;
      const double product = dot(column(g_, i), column(g_, j), ld_);
      left[count] = i;
      d[count] = 2 * product;
      gap[count] = squares_[j] - squares_[i];
      // Without a branch: in the later sweeps it would be mispredicted half of the time.
      count += product * product > tolerance * squares_[i] * squares_[j];
    }
    if (count == 0) return false;
    std::fill(d + count, d + kGroup, 1.0);
    std::fill(gap + count, gap + kGroup, 0.0);
    for (std::size_t p = 0; p < kGroup; ++p) {
      const double hypotenuse = std::sqrt(gap[p] * gap[p] + d[p] * d[p]);
      tangent[p] = d[p] / (gap[p] + std::copysign(hypotenuse, gap[p]));
      cosine[p] = 1 / std::sqrt(1 + tangent[p] * tangent[p]);
    }
    for (std::size_t p = 0; p < count; ++p) {
      const std::size_t i = left[p], j = round - i;
      const double sine = cosine[p] * tangent[p], shift = tangent[p] * d[p] / 2;
      const double x = squares_[i] - shift, y = squares_[j] + shift;
      // The longer column goes first: sorted columns need fewer sweeps.
      const bool swap = gap[p] > 0;
      rotate(swap ? sine : cosine[p], swap ? -cosine[p] : sine, column(g_, i), column(g_, j), ld_);
      squares_[i] = swap ? y : x;
      squares_[j] = swap ? x : y;
    }
    return true;
  }

  std::size_t r_ = 0, ld_ = 0;
  SymmetricEigen eigen_;
  Buffer<double> c_buffer_, g_buffer_, s_buffer_, squares_buffer_;
  Buffer<std::size_t> order_buffer_, pivot_buffer_;
  double *c_ = nullptr, *g_ = nullptr, *squares_ = nullptr;
  std::size_t *order_ = nullptr, *pivot_ = nullptr;
};

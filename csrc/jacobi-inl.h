// One-sided Jacobi SVD of a small square matrix: rotations from the right until its columns are orthogonal. Their
// number falls with a good start: the eigenvectors of M^T M where M is well-conditioned, else a QR with column
// pivoting, which keeps small singular values apart from large ones' rounding. Drmac and Veselic, "New fast and
// accurate Jacobi SVD algorithm I", SIAM J. Matrix Anal. Appl. 29 (2008).

// Far more than needed: 2 to 10, for r up to 512.
constexpr int kMaxSweeps = 30;
// Smallest eigenvalue of M^T M, relative to the largest, for which its eigenvectors are a good start: singular values
// down to 1e-7 of the largest, which then keep nine digits.
constexpr double kWellConditioned = 1e-14;
// Angle of which 512 squares are below a roundoff of 1.
constexpr double kSlight = 0x1p-31;
// Pairs of columns that are rotated together: their dependent square roots and divisions overlap, and for r up to 256
// their columns stay in the first-level cache.
constexpr std::size_t kGroup = 8;

// Storage is column-major throughout, columns padded with zeros to whole vectors.
class JacobiSvd {
 public:
  // M (r x r, row-major), with or without its right vectors. Then `advance` until it returns false, then `finish`.
  void begin(const double* m, std::size_t r, bool right) {
    r_ = r;
    ld_ = round_up(r, kDoubles);
    right_ = right;
    c_ = c_buffer_.reserve(r * ld_);
    g_ = g_buffer_.reserve(r * ld_);
    gt_ = gt_buffer_.reserve(r * ld_);
    vt_ = vt_buffer_.reserve(r * ld_);
    s_ = s_buffer_.reserve(r * ld_);
    squares_ = squares_buffer_.reserve(ld_);
    std::fill(squares_, squares_ + ld_, 0.0);
    taus_ = taus_buffer_.reserve(r);
    order_ = order_buffer_.reserve(r);
    pivot_ = pivot_buffer_.reserve(r);
    Vd sizes{}, beyond{};
    for (std::size_t i = 0; i < r; ++i) {
      std::copy_n(m + i * r, r, c_ + i * ld_);
      std::fill(c_ + i * ld_ + r, c_ + (i + 1) * ld_, 0.0);
      for (std::size_t j = 0; j < ld_; j += kDoubles) {
        const Vd x = load<Vd>(c_ + i * ld_ + j), size = x < 0 ? -x : x;
        sizes = size > sizes ? size : sizes;
        beyond += size <= std::numeric_limits<double>::max() ? Vd{} : Vd{} + 1;
      }
    }
    finite_ = !(sum(beyond) > 0);
    if (!finite_) return;
    double largest = 0;
    for (std::size_t i = 0; i < kDoubles; ++i) largest = std::max(largest, sizes[i]);
    // By a power of two: scaling then rounds nothing, and squares neither overflow nor underflow.
    exponent_ = largest > 0 ? std::ilogb(largest) : 0;
    const double up = std::scalbn(1.0, -exponent_ / 2), rest = std::scalbn(1.0, -exponent_ + exponent_ / 2);
    for (std::size_t i = 0; i < r * ld_; i += kDoubles) store(c_ + i, load<Vd>(c_ + i) * up * rest);
    // Row-major M is column-major M^T.
    multiply(c_, 1, ld_, c_, ld_, s_, ld_, r_, r_, ld_, false);
    eigen_.begin(s_, squares_, vt_, r_, ld_);
  }

  bool advance() { return finite_ && eigen_.advance(); }

  // Row k of wt and of vt: the left and the right vector of s[k]. Without right vectors, vt is not touched.
  SvdStatus finish(double* wt, double* s, double* vt) {
    if (!finite_) return SvdStatus::b_not_finite;
    std::iota(pivot_, pivot_ + r_, std::size_t{0});
    const bool well_conditioned = start_from_eigenvectors();
    std::fill(gt_, gt_ + r_ * ld_, 0.0);
    if (well_conditioned)
      rotate_slightly();
    else
      pivoted_qr();
    const SvdStatus status = orthogonalise();
    if (right_ && !well_conditioned) reflect_right();
    for (std::size_t j = 0; j < r_; ++j) squares_[j] = dot(column(g_, j), column(g_, j), ld_);
    std::iota(order_, order_ + r_, std::size_t{0});
    std::stable_sort(order_, order_ + r_, [&](auto i, auto j) { return squares_[i] > squares_[j]; });
    for (std::size_t k = 0; k < r_; ++k) {
      const double length = std::sqrt(squares_[order_[k]]);
      const bool zero = length <= kTiny;
      s[k] = zero ? 0 : std::scalbn(length, exponent_);
      const double inverse = zero ? 0 : 1 / length;
      for (std::size_t i = 0; i < r_; ++i) wt[k * r_ + pivot_[i]] = column(g_, order_[k])[i] * inverse;
      if (right_) std::copy_n(column(vt_, order_[k]), r_, vt + k * r_);
    }
    return r_ > 0 && !std::isfinite(s[0]) ? SvdStatus::not_converged : status;  // s may overflow where M does not
  }

 private:
  double* column(double* matrix, std::size_t j) const { return matrix + j * ld_; }

  // g_ <- M V for the eigenvectors V of M^T M, orthogonal but for the rounding of the product; false if M is too
  // ill-conditioned for that.
  bool start_from_eigenvectors() {
    const auto [least, most] = std::minmax_element(squares_, squares_ + r_);
    if (!eigen_.converged() || r_ == 0 || !(*least > kWellConditioned * *most)) return false;
    // The longest columns first, as `rotate_group` wants them.
    std::iota(order_, order_ + r_, std::size_t{0});
    std::sort(order_, order_ + r_, [&](auto i, auto j) { return squares_[i] > squares_[j]; });
    for (std::size_t k = 0; k < r_; ++k) std::copy_n(column(vt_, order_[k]), ld_, column(gt_, k));
    std::swap(vt_, gt_);
    std::fill(s_, s_ + r_ * ld_, 0.0);
    transpose(c_, ld_, s_, ld_, r_);
    multiply(vt_, ld_, 1, s_, ld_, g_, ld_, r_, r_, ld_, false);
    return true;
  }

  // g_ <- R^T of M^T P = Q R, columns taken in order of decreasing remainder: M = P R^T Q^T, so P times the left
  // vectors of g_ are M's. What is left in c_ is zero in the rows that are done, so whole vectors may be taken. Q stays
  // as reflectors, in c_'s columns and taus_.
  void pivoted_qr() {
    std::fill(taus_, taus_ + r_, 0.0);
    std::fill(g_, g_ + r_ * ld_, 0.0);
    std::fill(vt_, vt_ + r_ * ld_, 0.0);
    for (std::size_t j = 0; j < r_; ++j) {
      squares_[j] = dot(column(c_, j), column(c_, j), ld_);
      column(vt_, j)[j] = 1;
    }
    for (std::size_t k = 0; k < r_; ++k) {
      const auto best = static_cast<std::size_t>(std::max_element(squares_ + k, squares_ + r_) - squares_);
      std::swap_ranges(column(c_, k), column(c_, k) + ld_, column(c_, best));
      std::swap(squares_[k], squares_[best]);
      std::swap(pivot_[k], pivot_[best]);
      for (std::size_t i = 0; i < k; ++i) std::swap(column(g_, i)[k], column(g_, i)[best]);
      const double length = std::sqrt(squares_[k]);
      if (length <= kTiny) return;
      double* v = column(c_, k);
      const auto [tau, beta] = reflector(v, length, k, r_);
      const std::size_t first = k / kDoubles * kDoubles, rows = ld_ - first;
      taus_[k] = tau;
      column(g_, k)[k] = beta;
      for (std::size_t j = k + 1; j < r_; ++j) {
        double* y = column(c_, j);
        axpy(-tau * dot(v + first, y + first, rows), v + first, y + first, rows);
        column(g_, k)[j] = y[k];
        y[k] = 0;
        squares_[j] = dot(y + first, y + first, rows);  // anew: a difference would lose what little remains
      }
    }
  }

  // All rotations whose angles' squares are below rounding, at once: x <- x + a y and y <- y - a x, a = x.y / (x.x -
  // y.y), for all pairs of G's columns, and V's alike.
  void rotate_slightly() {
    transpose(g_, ld_, gt_, ld_, r_);
    multiply(g_, ld_, 1, gt_, ld_, s_, ld_, r_, r_, ld_, false);
    for (std::size_t i = 0; i < r_; ++i) squares_[i] = s_[i * ld_ + i];
    for (std::size_t i = 0; i < r_; ++i) {
      for (std::size_t j = 0; j < ld_; j += kDoubles) {
        const Vd product = load<Vd>(s_ + i * ld_ + j), gap = squares_[i] - load<Vd>(squares_ + j);
        const Vd size = product < 0 ? -product : product, bound = kSlight * (gap < 0 ? -gap : gap);
        store(s_ + i * ld_ + j, size < bound ? product / gap : Vd{});
      }
    }
    for (double** x : {&g_, &vt_}) {
      if (x == &vt_ && !right_) break;
      std::copy_n(*x, r_ * ld_, gt_);
      multiply(s_, ld_, 1, *x, ld_, gt_, ld_, r_, r_, ld_, true);
      std::swap(*x, gt_);
    }
  }

  // vt_ <- Q times the rotations that it holds.
  void reflect_right() {
    for (std::size_t j = 0; j < r_; ++j) {
      double* y = column(vt_, j);
      for (std::size_t k = r_; k-- > 0;)
        if (taus_[k] != 0) axpy(-taus_[k] * dot(column(c_, k), y, ld_), column(c_, k), y, ld_);
    }
  }

  // Rotates pairs of columns of G until all are orthogonal to rounding. The pairs (i, j) of a round have the same i +
  // j, and so no column in common; a sweep does the same as one row by row.
  SvdStatus orthogonalise() {
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      if (!find_pairs()) return SvdStatus::converged;
      bool rotated = false;
      for (std::size_t round = 1; round + 2 < 2 * r_; ++round) {
        std::size_t left[kGroup], count = 0;
        const std::size_t begin = round < r_ ? 0 : round - r_ + 1, end = (round + 1) / 2;
        for (std::size_t i = begin; i < end; ++i) {
          if (s_[i * ld_ + round - i] != 0) left[count++] = i;
          if (count == kGroup || (count > 0 && i + 1 == end)) {
            rotated |= rotate_group(left, count, round);
            count = 0;
          }
        }
      }
      if (!rotated) return SvdStatus::converged;
    }
    return SvdStatus::not_converged;
  }

  // Squares and products of G's columns, summed anew for each sweep and only updated within it: what that loses costs
  // no accuracy. True if there is a pair that is not orthogonal; s_ is 1 there, else 0.
  bool find_pairs() {
    transpose(g_, ld_, gt_, ld_, r_);
    upper_product(g_, ld_, 1, gt_, ld_, s_, ld_, r_, r_, false);
    for (std::size_t i = 0; i < r_; ++i) squares_[i] = s_[i * ld_ + i];
    Vd any{};
    for (std::size_t i = 0; i < r_; ++i) {
      const double bound = tolerance() * squares_[i];
      double* products = s_ + i * ld_;
      std::fill(products, products + i + 1, 0.0);
      for (std::size_t j = (i + 1) / kDoubles * kDoubles; j < ld_; j += kDoubles) {
        const Vd product = load<Vd>(products + j);
        const Vd bent = product * product > load<Vd>(squares_ + j) * bound ? Vd{} + 1 : Vd{};
        store(products + j, bent);
        any += bent;
      }
    }
    return sum(any) > 0;
  }

  double tolerance() const { return kEpsilon * kEpsilon * static_cast<double>(r_); }

  // The pairs (i, round - i) for the i in `candidates`; false if none needed it.
  bool rotate_group(const std::size_t* candidates, std::size_t candidate_count, std::size_t round) {
    std::size_t left[kGroup], count = 0;
    double d[kGroup], gap[kGroup], tangent[kGroup], cosine[kGroup];
    for (std::size_t k = 0; k < candidate_count; ++k) {
      const std::size_t i = candidates[k], j = round - i;
      const double product = dot(column(g_, i), column(g_, j), ld_);
      left[count] = i;
      d[count] = 2 * product;
      gap[count] = squares_[j] - squares_[i];
      count += product * product > tolerance() * squares_[i] * squares_[j];
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
      const double c = swap ? sine : cosine[p], s = swap ? -cosine[p] : sine;
      rotate(c, s, column(g_, i), column(g_, j), ld_);
      if (right_) rotate(c, s, column(vt_, i), column(vt_, j), ld_);
      squares_[i] = swap ? y : x;
      squares_[j] = swap ? x : y;
    }
    return true;
  }

  std::size_t r_ = 0, ld_ = 0;
  int exponent_ = 0;
  bool finite_ = true, right_ = false;
  SymmetricEigen eigen_;
  Buffer<double> c_buffer_, g_buffer_, gt_buffer_, vt_buffer_, s_buffer_, squares_buffer_, taus_buffer_;
  Buffer<std::size_t> order_buffer_, pivot_buffer_;
  double *c_ = nullptr, *g_ = nullptr, *gt_ = nullptr, *vt_ = nullptr, *s_ = nullptr, *squares_ = nullptr,
         *taus_ = nullptr;
  std::size_t *order_ = nullptr, *pivot_ = nullptr;
};

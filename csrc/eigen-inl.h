// Eigenvalues and orthonormal eigenvectors of a symmetric matrix: Householder tridiagonalisation, then implicit QL with
// Wilkinson's shift. Golub and Van Loan, "Matrix Computations", 4th ed., sections 8.3.1 and 8.3.5.

// A vector shorter than this, where the matrix' largest entry is about 1, counts as zero: products of two squares stay
// normal numbers.
constexpr double kTiny = 0x1p-200;

// The products of vectors that all small dense steps are made of; lengths are multiples of the lanes.
inline double dot(const double* x, const double* y, std::size_t n) {
  Vd even{}, odd{};
  std::size_t i = 0;
  for (; i + 2 * kDoubles <= n; i += 2 * kDoubles) {
    even += load<Vd>(x + i) * load<Vd>(y + i);
    odd += load<Vd>(x + i + kDoubles) * load<Vd>(y + i + kDoubles);
  }
  if (i < n) even += load<Vd>(x + i) * load<Vd>(y + i);
  return sum(even + odd);
}

// y += alpha x
inline void axpy(double alpha, const double* x, double* y, std::size_t n) {
  for (std::size_t i = 0; i < n; i += kDoubles) store(y + i, load<Vd>(y + i) + load<Vd>(x + i) * alpha);
}

// out <- the sum of a_i x_i over `count` rows x_i of n values.
inline void combine(const double* x, const double* a, std::size_t count, std::size_t ld, std::size_t n, double* out) {
  multiply(a, 0, 1, x, ld, out, 0, 1, count, n, false);
}

// (x, y) <- (c x - s y, s x + c y)
inline void rotate(double c, double s, double* x, double* y, std::size_t n) {
  for (std::size_t i = 0; i < n; i += kDoubles) {
    const Vd xi = load<Vd>(x + i), yi = load<Vd>(y + i);
    store(x + i, xi * c - yi * s);
    store(y + i, xi * s + yi * c);
  }
}

inline void transpose(const double* x, std::size_t ldx, double* out, std::size_t ldo, std::size_t r) {
  for (std::size_t i = 0; i < r; ++i)
    for (std::size_t j = 0; j < r; ++j) out[j * ldo + i] = x[i * ldx + j];
}

// x (n values, zero before `first`) <- v with v[first] = 1, such that (I - tau v v^T) x = beta e_first.
struct Reflector {
  double tau, beta;
};

inline Reflector reflector(double* x, double length, std::size_t first, std::size_t n) {
  const double beta = x[first] > 0 ? -length : length;
  const double tau = (beta - x[first]) / beta, scale = 1 / (x[first] - beta);
  for (std::size_t i = first + 1; i < n; ++i) x[i] *= scale;
  x[first] = 1;
  return {tau, beta};
}

// Rows of a step that share what they read.
constexpr std::size_t kRowsAtOnce = kVectorBytes == 64 ? 4 : 2;

// Rows i, i + 1, ... of a symmetric S, from column `first` on: less v w^T + w v^T; and p += S x as far as they go.
template <std::size_t kRows>
inline void update_rows(double* s, std::size_t ld, std::size_t i, const double* v, const double* w, const double* x,
                        std::size_t first, double* p) {
  double vi[kRows], wi[kRows], xi[kRows];
  for (std::size_t k = 0; k < kRows; ++k) vi[k] = v[i + k], wi[k] = w[i + k], xi[k] = x[i + k];
  double* rows = s + i * ld;
  for (std::size_t j = first / kDoubles * kDoubles; j < ld; j += kDoubles) {
    const Vd vj = load<Vd>(v + j), wj = load<Vd>(w + j);
    Vd sum = load<Vd>(p + j);
#pragma GCC unroll 4
    for (std::size_t k = 0; k < kRows; ++k) {
      const Vd row = load<Vd>(rows + k * ld + j) - wj * vi[k] - vj * wi[k];
      store(rows + k * ld + j, row);
      sum += row * xi[k];
    }
    store(p + j, sum);
  }
}

// The iteration is a chain of square roots and divisions, each of which waits for the last: `advance` goes one link, so
// that two matrices can take turns and the processor works on both at once.
class SymmetricEigen {
 public:
  // s: r rows of ld values, zero beyond r; overwritten. Its eigenvalues are left in d, in no order, and its
  // eigenvectors in the rows of qt (r x ld), unless that is null, once `advance` has returned false.
  void begin(double* s, double* d, double* qt, std::size_t r, std::size_t ld) {
    d_ = d;
    qt_ = qt;
    r_ = r;
    ld_ = ld;
    l_ = i_ = m_ = 0;
    steps_ = 0;
    converged_ = true;
    e_ = vectors_.reserve(2 * r + 3 * ld);
    double *tau = e_ + r, *p = tau + r, *w = p + ld, *nothing = w + ld;
    std::fill(e_, e_ + 2 * r + 3 * ld, 0.0);
    const double* before = nothing;  // the vector of the step before, whose update, with w, is still to be made
    for (std::size_t k = 0; k + 1 < r; ++k) {
      double* v = s + k * ld;
      update_rows<1>(s, ld, k, before, w, nothing, k, p);
      d[k] = v[k];
      std::fill(v, v + k + 1, 0.0);
      const double length = std::sqrt(dot(v, v, ld));
      if (length > kTiny) {
        const Reflector h = reflector(v, length, k + 1, r);
        tau[k] = h.tau;
        e_[k] = h.beta;
      } else {
        std::fill(v, v + r, 0.0);
      }
      const std::size_t first = (k + 1) / kDoubles * kDoubles, n = ld - first;
      std::fill(p, p + ld, 0.0);
      std::size_t i = k + 1;
      for (; i + kRowsAtOnce <= r; i += kRowsAtOnce) update_rows<kRowsAtOnce>(s, ld, i, before, w, v, k + 1, p);
      for (; i < r; ++i) update_rows<1>(s, ld, i, before, w, v, k + 1, p);
      std::fill(p, p + k + 1, 0.0);
      for (std::size_t j = k + 1; j < r; ++j) p[j] *= tau[k];
      axpy(-tau[k] / 2 * dot(p + first, v + first, n), v + first, p + first, n);
      before = v;
      std::swap(p, w);
    }
    if (r > 0) {
      update_rows<1>(s, ld, r - 1, before, w, nothing, r - 1, p);
      d[r - 1] = s[(r - 1) * ld + r - 1];
    }
    if (qt == nullptr) return;
    // Q = H_0 H_1 ..., built from the last: only rows and columns that a reflector reaches have changed before it.
    double* q = q_.reserve(r * ld);
    std::fill(q, q + r * ld, 0.0);
    for (std::size_t i = 0; i < r; ++i) q[i * ld + i] = 1;
    for (std::size_t k = r; k-- > 0;) {
      if (tau[k] == 0) continue;
      const std::size_t first = (k + 1) / kDoubles * kDoubles, n = ld - first;
      const double* v = s + k * ld;
      combine(q + (k + 1) * ld + first, v + k + 1, r - k - 1, ld, n, w);
      for (std::size_t i = k + 1; i < r; ++i) axpy(-tau[k] * v[i], w, q + i * ld + first, n);
    }
    std::fill(qt, qt + r * ld, 0.0);
    transpose(q, ld, qt, ld, r);
  }

  // One rotation of an implicit QL step; false when all are done.
  bool advance() {
    if (i_ == l_ && !next_step()) return false;
    --i_;
    const double f = s_ * e_[i_], b = c_ * e_[i_];
    const double length = std::sqrt(f * f + g_ * g_);
    e_[i_ + 1] = length;
    s_ = length > kTiny ? f / length : 0;
    c_ = length > kTiny ? g_ / length : 1;
    const double d = d_[i_ + 1] - p_;
    const double t = (d_[i_] - d) * s_ + 2 * c_ * b;
    p_ = s_ * t;
    d_[i_ + 1] = d + p_;
    g_ = c_ * t - b;
    if (qt_ != nullptr) rotate(c_, s_, qt_ + i_ * ld_, qt_ + (i_ + 1) * ld_, ld_);
    if (i_ == l_) {
      d_[l_] -= p_;
      e_[l_] = g_;
      e_[m_] = 0;
    }
    return true;
  }

  bool converged() const { return converged_; }

  // In place of `advance` where there are no vectors: QL without square roots, after Pal, Walker and Kahan (Parlett,
  // "The Symmetric Eigenvalue Problem", section 8.15). Its chain is half as long, as two of its divisions wait for the
  // same.
  void values() {
    double* squares = e_;
    for (std::size_t i = 0; i < r_; ++i) squares[i] *= squares[i];
    while (l_ < r_) {
      const auto coupled = [&](std::size_t i) {
        const double size = kEpsilon / 2 * (std::abs(d_[i]) + std::abs(d_[i + 1]));
        return squares[i] > size * size;
      };
      m_ = l_;
      while (m_ + 1 < r_ && coupled(m_)) ++m_;
      if (m_ == l_) {
        ++l_;
        steps_ = 0;
        continue;
      }
      if (++steps_ > kMaxSteps) {
        converged_ = false;
        return;
      }
      const double e = std::sqrt(squares[l_]), half = (d_[l_ + 1] - d_[l_]) / (2 * e);
      const double shift = d_[l_] - e / (half + std::copysign(std::sqrt(1 + half * half), half));
      double c = 1, s = 0, gamma = d_[m_] - shift, p = gamma * gamma;
      for (std::size_t i = m_; i-- > l_;) {
        const double b = squares[i], sum = p + b, old_c = c, old_gamma = gamma;
        squares[i + 1] = s * sum;
        const double inverse = sum / p;
        c = p / sum;
        s = b / sum;
        gamma = c * (d_[i] - shift) - s * old_gamma;
        d_[i + 1] = old_gamma + (d_[i] - gamma);
        p = c > kTiny ? gamma * gamma * inverse : old_c * b;
      }
      squares[l_] = s * p;
      d_[l_] = shift + gamma;
    }
  }

 private:
  static constexpr int kMaxSteps = 60;

  // A step goes from row m, the end of the block that starts at l, back to l; until e[l], which couples d[l] and
  // d[l + 1], is negligible.
  bool next_step() {
    for (; l_ < r_; ++l_, steps_ = 0) {
      m_ = l_;
      while (m_ + 1 < r_ && std::abs(e_[m_]) > kEpsilon / 2 * (std::abs(d_[m_]) + std::abs(d_[m_ + 1]))) ++m_;
      if (m_ == l_) continue;
      if (++steps_ > kMaxSteps) return converged_ = false;
      const double half = (d_[l_ + 1] - d_[l_]) / (2 * e_[l_]);
      g_ = d_[m_] - d_[l_] + e_[l_] / (half + std::copysign(std::sqrt(1 + half * half), half));
      s_ = c_ = 1;
      p_ = 0;
      i_ = m_;
      return true;
    }
    i_ = l_;
    return false;
  }

  double *d_ = nullptr, *e_ = nullptr, *qt_ = nullptr;
  std::size_t r_ = 0, ld_ = 0, l_ = 0, i_ = 0, m_ = 0;
  double g_ = 0, s_ = 1, c_ = 1, p_ = 0;
  int steps_ = 0;
  bool converged_ = true;
  Buffer<double> vectors_, q_;
};

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

class SymmetricEigen {
 public:
  // s (r rows of ld values, zero beyond r; overwritten): its eigenvalues, in no order, to d, and eigenvectors to the
  // rows of qt (r x ld). False if the iteration did not converge.
  bool operator()(double* s, double* d, double* qt, std::size_t r, std::size_t ld) {
    double* e = vectors_.reserve(r + 2 * ld);
    double *p = e + r, *tau = p + ld;
    std::fill(e, e + r + 2 * ld, 0.0);
    for (std::size_t k = 0; k + 1 < r; ++k) {
      double* v = s + k * ld;
      d[k] = v[k];
      std::fill(v, v + k + 1, 0.0);
      const double length = std::sqrt(dot(v, v, ld));
      if (length <= kTiny) {
        std::fill(v, v + r, 0.0);
        continue;
      }
      const Reflector h = reflector(v, length, k + 1, r);
      tau[k] = h.tau;
      e[k] = h.beta;
      const std::size_t first = (k + 1) / kDoubles * kDoubles, n = ld - first;
      std::fill(p, p + k + 1, 0.0);
      for (std::size_t i = k + 1; i < r; ++i) p[i] = h.tau * dot(s + i * ld + first, v + first, n);
      axpy(-h.tau / 2 * dot(p + first, v + first, n), v + first, p + first, n);
      for (std::size_t i = k + 1; i < r; ++i) {
        const double pi = p[i], vi = v[i];
        for (std::size_t j = first; j < ld; j += kDoubles)
          store(s + i * ld + j, load<Vd>(s + i * ld + j) - load<Vd>(p + j) * vi - load<Vd>(v + j) * pi);
      }
    }
    if (r > 0) d[r - 1] = s[(r - 1) * ld + r - 1];
    // Q = H_0 H_1 ..., built from the last: only columns that a reflector reaches have changed before it.
    std::fill(qt, qt + r * ld, 0.0);
    for (std::size_t i = 0; i < r; ++i) qt[i * ld + i] = 1;
    for (std::size_t k = r; k-- > 0;) {
      if (tau[k] == 0) continue;
      const std::size_t first = (k + 1) / kDoubles * kDoubles, n = ld - first;
      const double* v = s + k * ld + first;
      for (std::size_t j = k + 1; j < r; ++j) axpy(-tau[k] * dot(v, qt + j * ld + first, n), v, qt + j * ld + first, n);
    }
    for (std::size_t l = 0; l < r; ++l)
      if (!chase(d, e, qt, l, r, ld)) return false;
    return true;
  }

 private:
  // QL steps until e[l], which couples d[l] and d[l + 1], is negligible.
  static bool chase(double* d, double* e, double* qt, std::size_t l, std::size_t r, std::size_t ld) {
    constexpr int kMaxSteps = 60;
    for (int step = 0; step < kMaxSteps; ++step) {
      std::size_t m = l;
      while (m + 1 < r && std::abs(e[m]) > kEpsilon / 2 * (std::abs(d[m]) + std::abs(d[m + 1]))) ++m;
      if (m == l) return true;
      const double half = (d[l + 1] - d[l]) / (2 * e[l]);
      double g = d[m] - d[l] + e[l] / (half + std::copysign(std::sqrt(1 + half * half), half));
      double s = 1, c = 1, p = 0;
      for (std::size_t i = m; i-- > l;) {
        const double f = s * e[i], b = c * e[i];
        const double length = std::sqrt(f * f + g * g);
        e[i + 1] = length;
        if (length <= kTiny) {  // split in two: start again on what is left
          d[i + 1] -= p;
          e[m] = 0;
          break;
        }
        s = f / length;
        c = g / length;
        g = d[i + 1] - p;
        const double t = (d[i] - g) * s + 2 * c * b;
        p = s * t;
        d[i + 1] = g + p;
        g = c * t - b;
        rotate(c, s, qt + i * ld, qt + (i + 1) * ld, ld);
        if (i == l) {
          d[l] -= p;
          e[l] = g;
          e[m] = 0;
        }
      }
    }
    return false;
  }

  Buffer<double> vectors_;
};

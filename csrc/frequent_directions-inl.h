// One step of Frequent Directions, as csrc/kernels.h has it.
class FrequentDirections {
 public:
  double operator()(const FrequentDirectionsTask& task) {
    const auto [basis, squares, z, k, m, out, out_squares] = task;
    const std::size_t ld = round_up(m, kDoubles);
    std::size_t r = 0;
    while (r < k && squares[r] > 0) ++r;
    const double* rows = basis;
    if (ld != m) {
      double* padded = padded_.reserve(r * ld);
      for (std::size_t i = 0; i < r; ++i) pad(basis + i * m, m, ld, padded + i * ld);
      rows = padded;
    }
    double* rest = rest_.reserve(ld);
    double* p = p_.reserve(2 * (k + 1));
    double *d = p + k + 1, *values = values_.reserve(k + 1), *q = q_.reserve((k + 1) * (k + 1));
    pad(z, m, ld, rest);
    const double length = length_of(rest, ld);
    if (!std::isfinite(length)) return std::numeric_limits<double>::quiet_NaN();
    project(rows, r, ld, rest, p, false);
    double left = length_of(rest, ld);
    // Twice is enough, and once where much is left; if a second time takes half of it, it was rounding.
    if (left < length / 2) {
      const double once = left;
      project(rows, r, ld, rest, p, true);
      left = length_of(rest, ld);
      if (left < once / 2) left = 0;
    }
    std::copy_n(squares, r, d);
    std::size_t n = r;
    if (left > 0) {
      for (std::size_t j = 0; j < ld; j += kDoubles) store(rest + j, load<Vd>(rest + j) / left);
      d[n] = 0;
      p[n++] = left;
    }
    eigen_(d, p, n, values, q);
    double removed = 0;
    if (n > k) removed = std::max(values[--n], 0.0);
    const double zero = n > 0 ? static_cast<double>(n) * kEpsilon * values[0] : 0;
    std::size_t kept = 0;
    for (; kept < n && values[kept] - removed > zero; ++kept) out_squares[kept] = values[kept] - removed;
    std::fill(out_squares + kept, out_squares + k, 0.0);
    const std::size_t width = left > 0 ? r + 1 : r;  // of a row of q
    double* product = ld == m ? out : product_.reserve(kept * ld);
    multiply(q, width, 1, rows, ld, product, ld, kept, r, ld, false);
    if (left > 0) multiply(q + r, width, 1, rest, ld, product, ld, kept, 1, ld, true);
    if (ld != m)
      for (std::size_t i = 0; i < kept; ++i) std::copy_n(product + i * ld, m, out + i * m);
    std::fill(out + kept * m, out + k * m, 0.0);
    return removed;
  }

 private:
  static void pad(const double* from, std::size_t m, std::size_t ld, double* to) {
    std::copy_n(from, m, to);
    std::fill(to + m, to + ld, 0.0);
  }

  // 0 where the square is subnormal: it has too few digits to divide by its root.
  static double length_of(const double* x, std::size_t n) {
    const double squared = dot(x, x, n);
    return squared < std::numeric_limits<double>::min() ? 0 : std::sqrt(squared);
  }

  // p [+]= the products of x with orthonormal rows, and x less its part in their span.
  static void project(const double* rows, std::size_t r, std::size_t ld, double* x, double* p, bool add) {
    double parts[kBlock];
    for (std::size_t first = 0; first < r; first += kBlock) {
      const std::size_t count = std::min(kBlock, r - first);
      for (std::size_t i = 0; i < count; ++i) {
        parts[i] = dot(rows + (first + i) * ld, x, ld);
        p[first + i] = add ? p[first + i] + parts[i] : parts[i];
      }
      for (std::size_t i = 0; i < count; ++i) axpy(-parts[i], rows + (first + i) * ld, x, ld);
    }
  }

  static constexpr std::size_t kBlock = 8;  // rows that stay in the first-level cache between two uses
  RankOneEigen eigen_;
  Buffer<double> padded_, rest_, p_, values_, q_, product_;
};

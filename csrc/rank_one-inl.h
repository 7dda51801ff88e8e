// Eigenvalues and eigenvectors of diag(d) + v v^T: the roots of the secular equation 1 + sum v_j^2 / (d_j - x) = 0, one
// in each gap of the d. Bunch, Nielsen and Sorensen, Numer. Math. 31 (1978); deflation as in LAPACK's dlaed2; roots by
// the fixed weight method of Li, LAPACK Working Note 89 (1993); eigenvectors from a v of which the computed roots are
// the exact ones, so that they are orthogonal however close roots are: Gu and Eisenstat, SIAM J. Matrix Anal. Appl. 15
// (1994).
class RankOneEigen {
 public:
  // d, v: n finite values. values (n, descending), vectors (n x n): row k is the eigenvector of values[k].
  void operator()(const double* d, const double* v, std::size_t n, double* values, double* vectors) {
    order_ = order_buffer_.reserve(2 * n);
    poles_ = poles_buffer_.reserve(n);
    z_ = z_buffer_.reserve(n);
    rotations_ = rotations_buffer_.reserve(n);
    std::iota(order_, order_ + n, std::size_t{0});
    std::stable_sort(order_, order_ + n, [&](auto i, auto j) { return d[i] > d[j]; });
    // By powers of two: squares neither overflow nor underflow, and nothing is rounded.
    double most = 0;
    for (std::size_t i = 0; i < n; ++i) most = std::max({most, std::sqrt(std::abs(d[i])), std::abs(v[i])});
    const int exponent = most > 0 ? std::ilogb(most) : 0;
    double squared = 0;
    for (std::size_t i = 0; i < n; ++i) {
      poles_[i] = std::scalbn(d[order_[i]], -2 * exponent);
      z_[i] = std::scalbn(v[order_[i]], -exponent);
      squared += z_[i] * z_[i];
    }
    deflate(n, squared);
    solve();
    std::fill(vectors, vectors + n * n, 0.0);
    // Each eigenvalue's place among all: those of the roots are descending, the others are put between.
    std::size_t* rank = order_ + n;
    found_ = found_buffer_.reserve(n);
    for (std::size_t i = 0; i < n; ++i) found_[i] = poles_[i];
    for (std::size_t i = 0; i < count_; ++i) found_[kept_[i]] = roots_[i];
    std::iota(rank, rank + n, std::size_t{0});
    std::stable_sort(rank, rank + n, [&](auto i, auto j) { return found_[i] > found_[j]; });
    std::size_t* row = row_buffer_.reserve(n);
    for (std::size_t k = 0; k < n; ++k) {
      values[k] = std::scalbn(found_[rank[k]], 2 * exponent);
      row[rank[k]] = k;
      vectors[k * n + order_[rank[k]]] = 1;
    }
    for (std::size_t i = 0; i < count_; ++i) {
      double* q = vectors + row[kept_[i]] * n;
      for (std::size_t j = 0; j < count_; ++j) q[order_[kept_[j]]] = differences_[i * ld_ + j];
    }
    for (std::size_t t = rotated_; t-- > 0;) {
      const auto [i, j, c, s] = rotations_[t];
      for (std::size_t k = 0; k < n; ++k) {
        double &x = vectors[k * n + order_[i]], &y = vectors[k * n + order_[j]];
        const double x0 = x, y0 = y;
        x = c * x0 - s * y0;
        y = s * x0 + c * y0;
      }
    }
  }

 private:
  struct Rotation {
    std::size_t i, j;
    double c, s;
  };

  // What hardly couples to v, and one of two poles that hardly differ once v has been rotated into the other, is an
  // eigenvalue as it stands; kept_ are the rest.
  void deflate(std::size_t n, double squared) {
    kept_ = kept_buffer_.reserve(n);
    count_ = rotated_ = 0;
    double size = squared;
    for (std::size_t i = 0; i < n; ++i) size = std::max(size, std::abs(poles_[i]));
    const double tolerance = 8 * kEpsilon * size, length = std::sqrt(squared);
    for (std::size_t i = 0; i < n; ++i) {
      if (std::abs(z_[i]) * length <= tolerance) continue;
      if (count_ > 0) {
        const std::size_t last = kept_[count_ - 1];
        const double both = std::hypot(z_[last], z_[i]), c = z_[i] / both, s = -z_[last] / both;
        if (std::abs((poles_[last] - poles_[i]) * c * s) <= tolerance) {
          const double above = poles_[last], below = poles_[i];
          poles_[last] = above * c * c + below * s * s;
          poles_[i] = above * s * s + below * c * c;
          z_[last] = 0;
          z_[i] = both;
          rotations_[rotated_++] = {last, i, c, s};
          kept_[count_ - 1] = i;
          continue;
        }
      }
      kept_[count_++] = i;
    }
  }

  // roots_, and eigenvectors in the rows of differences_ (ld_ apart).
  void solve() {
    ld_ = round_up(count_, kDoubles);
    d_ = d_buffer_.reserve(ld_);
    w_ = w_buffer_.reserve(ld_);
    gaps_ = gaps_buffer_.reserve(ld_);
    roots_ = roots_buffer_.reserve(ld_);
    differences_ = differences_buffer_.reserve(count_ * ld_);
    std::fill(d_, d_ + ld_, -0x1p200);  // of padding: far from all, and without weight
    std::fill(w_, w_ + ld_, 0.0);
    double total = 0;
    for (std::size_t i = 0; i < count_; ++i) {
      d_[i] = poles_[kept_[i]];
      w_[i] = z_[kept_[i]] * z_[kept_[i]];
      total += w_[i];
    }
    for (std::size_t i = 0; i < count_; ++i) find(i, total);
    double* squares = gaps_;
    std::fill(squares, squares + ld_, 1.0);
    for (std::size_t i = 0; i < count_; ++i) {
      const double pole = d_[i], own = -differences_[i * ld_ + i];
      const double before = squares[i];
      for (std::size_t j = 0; j < ld_; j += kDoubles)
        store(squares + j, load<Vd>(squares + j) * (load<Vd>(differences_ + i * ld_ + j) / (load<Vd>(d_ + j) - pole)));
      squares[i] = before * own;
    }
    for (std::size_t j = 0; j < count_; ++j) squares[j] = std::copysign(std::sqrt(squares[j]), z_[kept_[j]]);
    std::fill(squares + count_, squares + ld_, 0.0);
    for (std::size_t i = 0; i < count_; ++i) {
      double* q = differences_ + i * ld_;
      for (std::size_t j = 0; j < ld_; j += kDoubles) store(q + j, load<Vd>(squares + j) / load<Vd>(q + j));
      const double inverse = 1 / std::sqrt(dot(q, q, ld_));
      for (std::size_t j = 0; j < ld_; j += kDoubles) store(q + j, load<Vd>(q + j) * inverse);
    }
  }

  struct Value {
    double f, slope, size;
  };

  // Of sign + sum w_j / (gap_j - x), which grows between its poles.
  Value at(double x, double sign) const {
    Vd f{}, slope{}, size{};
    for (std::size_t j = 0; j < ld_; j += kDoubles) {
      const Vd w = load<Vd>(w_ + j), inverse = 1 / (load<Vd>(gaps_ + j) - x), term = w * inverse;
      f += term;
      slope += term * inverse;
      size += term < 0 ? -term : term;
    }
    return {sign + sum(f), sum(slope), 1 + sum(size)};
  }

  // Root i, above d_[i] and below the next pole. It is sought as its distance x > 0 from the nearer of the two, which
  // keeps all digits of what is small; below the upper one the axis is turned round, and the equation with it.
  void find(std::size_t i, double total) {
    const double gap = i > 0 ? d_[i - 1] - d_[i] : total;
    double sign = 1;
    std::size_t origin = i;
    set_gaps(origin, sign);
    double low = 0, high = i > 0 ? gap / 2 : gap, x = high;
    Value here = at(x, sign);
    if (i > 0 && here.f < 0) {
      sign = -1;
      origin = i - 1;
      set_gaps(origin, sign);
      here.f = -here.f;
    }
    constexpr int kMost = 100;
    for (int step = 0; step < kMost; ++step) {
      if (std::abs(here.f) <= kEpsilon * here.size) break;
      (here.f < 0 ? low : high) = x;
      const double next = i > 0 ? between(here, x, w_[origin], gap) : x * here.slope * x / (here.f + here.slope * x);
      const double tried = next > low && next < high ? next : low > 0 ? std::sqrt(low) * std::sqrt(high) : high / 1024;
      if (std::abs(tried - x) <= kEpsilon * x) break;
      x = tried;
      here = at(x, sign);
    }
    for (std::size_t j = 0; j < ld_; j += kDoubles) store(differences_ + i * ld_ + j, (load<Vd>(gaps_ + j) - x) * sign);
    roots_[i] = d_[origin] + sign * x;
  }

  void set_gaps(std::size_t origin, double sign) {
    const double from = d_[origin];
    for (std::size_t j = 0; j < ld_; j += kDoubles) store(gaps_ + j, (load<Vd>(d_ + j) - from) * sign);
  }

  // The root in (0, gap) of c - weight / y + b / (gap - y), with c and b such that it has value and slope at x.
  static double between(const Value& here, double x, double weight, double gap) {
    const double left = gap - x, slope = here.slope - weight / (x * x);
    const double b = slope * left * left, c = here.f + weight / x - slope * left;
    const double a = weight + b + c * gap, root = std::sqrt(std::max(a * a - 4 * c * weight * gap, 0.0));
    return a > 0 ? 2 * weight * gap / (a + root) : (a - root) / (2 * c);
  }

  std::size_t *order_ = nullptr, *kept_ = nullptr, count_ = 0, rotated_ = 0, ld_ = 0;
  double *poles_ = nullptr, *z_ = nullptr, *d_ = nullptr, *w_ = nullptr, *gaps_ = nullptr;
  double *roots_ = nullptr, *differences_ = nullptr, *found_ = nullptr;
  Rotation* rotations_ = nullptr;
  Buffer<std::size_t> order_buffer_, kept_buffer_, row_buffer_;
  Buffer<double> poles_buffer_, z_buffer_, d_buffer_, w_buffer_, gaps_buffer_, roots_buffer_, differences_buffer_;
  Buffer<double> found_buffer_;
  Buffer<Rotation> rotations_buffer_;
};

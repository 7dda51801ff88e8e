// The SVD of one module by Gram matrices: see kernels/lowrank_svd for the mathematics.

// Rows of a triangle that are worked on together, from the cache.
constexpr std::size_t kPanel = 16;

// R (upper triangle, zero below) <- the Cholesky factor of the symmetric matrix in its place, R^T R; false if a pivot
// is not positive. Before a panel of rows is taken apart, what the rows above contribute comes off at once.
inline bool cholesky(double* g, std::size_t r, std::size_t ld, double* work) {
  for (std::size_t begin = 0; begin < r; begin += kPanel) {
    const std::size_t end = std::min(r, begin + kPanel), n = ld - begin;
    multiply(g + begin, 1, ld, g + begin, ld, work, n, end - begin, begin, n, false);
    for (std::size_t k = begin; k < end; ++k) axpy(-1, work + (k - begin) * n, g + k * ld + begin, n);
    for (std::size_t k = begin; k < end; ++k) {
      double* row = g + k * ld;
      if (!(row[k] > 0)) return false;
      std::fill(row, row + k, 0.0);
      const double scale = 1 / std::sqrt(row[k]);
      const std::size_t first = k / kDoubles * kDoubles;
      for (std::size_t j = k; j < r; ++j) row[j] *= scale;
      for (std::size_t i = k + 1; i < end; ++i) axpy(-row[i], row + first, g + i * ld + first, ld - first);
    }
  }
  return true;
}

// X <- R^-1 X for an upper triangular R; both r rows of ld values.
inline void solve_upper(const double* triangle, double* x, std::size_t r, std::size_t ld) {
  for (std::size_t i = r; i-- > 0;) {
    for (std::size_t k = i + 1; k < r; ++k) axpy(-triangle[i * ld + k], x + k * ld, x + i * ld, ld);
    const double scale = 1 / triangle[i * ld + i];
    for (std::size_t k = 0; k < r; ++k) x[i * ld + k] *= scale;
  }
}

class LowrankSvd {
 public:
  void operator()(SvdTask& task) {
    const std::size_t r = task.b.r, ld = round_up(r, kDoubles);
    if (r == 0) {
      task.status = SvdStatus::converged;
      task.loss = task.amplification = 0;
      return;
    }
    double* grams[2] = {grams_[0].reserve(r * ld), grams_[1].reserve(r * ld)};
    double* triangles[2] = {triangles_[0].reserve(r * ld), triangles_[1].reserve(r * ld)};
    double *small = small_.reserve(r * r), *wt = wt_.reserve(r * r);
    double* transforms[2] = {transforms_[0].reserve(r * ld), transforms_[1].reserve(r * ld)};
    double* product = products_.reserve(2 * r * ld);
    task.loss = std::numeric_limits<double>::infinity();
    task.amplification = 1;
    task.status = SvdStatus::converged;
    std::fill(task.s, task.s + r, 0.0);
    const bool values_alone = task.t_b == nullptr;
    if (!values_alone) {
      std::fill(task.t_b, task.t_b + r * r, 0.0);
      std::fill(task.t_a, task.t_a + r * r, 0.0);
    }
    for (int side = 0; side < 2; ++side) {
      if (!gram(side == 0 ? task.b : task.a, grams[side], ld, gram_work_)) {
        task.status = side == 0 ? SvdStatus::b_not_finite : SvdStatus::a_not_finite;
        return;
      }
      std::copy(grams[side], grams[side] + r * ld, triangles[side]);
    }
    if (values_alone) {
      if (cholesky(triangles[0], r, ld, product)) values(task, triangles[0], grams, product, r, ld);
      return;
    }
    if (!cholesky(triangles[0], r, ld, product) || !cholesky(triangles[1], r, ld, product)) return;
    // The core R_B R_A^T, by way of R_A^T.
    std::fill(product, product + r * ld, 0.0);
    transpose(triangles[1], ld, product, ld, r);
    double* core = product + r * ld;
    multiply(triangles[0], ld, 1, product, ld, core, ld, r, r, ld, false);
    for (std::size_t i = 0; i < r; ++i) std::copy(core + i * ld, core + i * ld + r, small + i * r);
    svd_.begin(small, r, false);
    while (svd_.advance()) {
    }
    task.status = svd_.finish(wt, task.s, nullptr);
    if (task.status != SvdStatus::converged) {  // it may have overflowed
      task.status = SvdStatus::not_converged;
      return;
    }
    // T_B = R_B^-1 W, and T_A = R_A^-1 Z = R_B^T W diag(1/s): the core's right vectors are not needed.
    double* w = transforms[0];
    std::fill(w, w + r * ld, 0.0);
    transpose(wt, r, w, ld, r);
    multiply(triangles[0], 1, ld, w, ld, transforms[1], ld, r, r, ld, false);
    for (std::size_t i = 0; i < r; ++i)
      for (std::size_t k = 0; k < r; ++k) transforms[1][i * ld + k] /= task.s[k];
    solve_upper(triangles[0], w, r, ld);
    task.loss = 0;
    task.amplification = 0;
    for (int side = 0; side < 2; ++side) {
      const Factor& factor = side == 0 ? task.b : task.a;
      double* out = side == 0 ? task.t_b : task.t_a;
      assess(task, grams[side], transforms[side], static_cast<double>(factor.length), r, ld);
      for (std::size_t i = 0; i < r; ++i) std::copy_n(transforms[side] + i * ld, r, out + i * r);
    }
  }

 private:
  // s^2 are the eigenvalues of R_B G_A R_B^T, which err by some (sqrt(length) + 2 r) roundoffs of |B|^2 |A|^2, and a
  // value of s by no more than the root of that.
  void values(SvdTask& task, const double* triangle, double* const* grams, double* product, std::size_t r,
              std::size_t ld) {
    double *x = small_.reserve(r * ld), *squares = wt_.reserve(ld);
    std::fill(product, product + r * ld, 0.0);
    transpose(triangle, ld, x, ld, r);
    for (std::size_t i = 0; i < r; ++i) std::fill(x + i * ld + r, x + (i + 1) * ld, 0.0);
    // Nothing is multiplied with what lies below R's diagonal, but for corners.
    for (std::size_t j = 0; j < r; j += kPanel)
      multiply(grams[1] + j, ld, 1, x + j * ld + j, ld, product + j, ld, r, r - j, std::min(kPanel, ld - j), false);
    for (std::size_t i = 0; i < r; i += kPanel)
      multiply(triangle + i * ld + i, ld, 1, product + i * ld, ld, x + i * ld, ld, std::min(kPanel, r - i), r - i, ld,
               false);
    double sizes[2] = {0, 0}, largest = 0;
    for (std::size_t i = 0; i < r; ++i) {
      for (int side = 0; side < 2; ++side) sizes[side] += grams[side][i * ld + i];
      largest = std::max(largest, x[i * ld + i]);
    }
    if (!(largest > 0) || !std::isfinite(largest * static_cast<double>(r))) return;
    const int exponent = std::ilogb(largest);
    const double down = std::scalbn(1.0, -exponent);
    for (std::size_t i = 0; i < r * ld; ++i) x[i] *= down;
    eigen_.begin(x, squares, nullptr, r, ld);
    eigen_.values();
    if (!eigen_.converged()) return;
    for (std::size_t k = 0; k < r; ++k)
      if (!std::isfinite(squares[k])) return;
    std::sort(squares, squares + r, [](double one, double other) { return one > other; });
    for (std::size_t k = 0; k < r; ++k) task.s[k] = std::sqrt(std::scalbn(std::max(squares[k], 0.0), exponent));
    const double length = static_cast<double>(std::max(task.b.length, task.a.length));
    const double roundoffs = (std::sqrt(length) + 2 * static_cast<double>(r)) * kEpsilon / 2;
    const double loss = std::sqrt(roundoffs * sizes[0]) * std::sqrt(sizes[1]) / task.s[0];
    if (std::isfinite(loss)) task.loss = loss;
  }

  // What the steps lost shows in T^T G T, which is I only if the triangles are Cholesky factors and W is orthogonal.
  // What the Gram matrices had lost before does not show: with d^2 its diagonal, G errs by about (sqrt(length) + r)
  // roundoffs of d_i d_j, and T carries that into U^T U.
  void assess(SvdTask& task, const double* gram, const double* t, double length, std::size_t r, std::size_t ld) {
    double *gt = products_.reserve(2 * r * ld), *seen = gt + r * ld;
    multiply(gram, ld, 1, t, ld, gt, ld, r, r, ld, false);
    multiply(t, 1, ld, gt, ld, seen, ld, r, r, ld, false);
    double off = 0, carried = 0, largest = 0;
    double* columns = wt_.reserve(r * r);  // of |factor| |T|, squared
    std::fill(columns, columns + r, 0.0);
    for (std::size_t i = 0; i < r; ++i) {
      for (std::size_t j = 0; j < r; ++j) {
        const double excess = seen[i * ld + j] - (i == j ? 1 : 0);
        off += excess * excess;
        columns[j] += gram[i * ld + i] * t[i * ld + j] * t[i * ld + j];
      }
    }
    for (std::size_t j = 0; j < r; ++j) {
      carried += columns[j];
      largest = std::max(largest, columns[j]);
    }
    const double loss = std::sqrt(off) + (std::sqrt(length) + static_cast<double>(r)) * kEpsilon / 2 * carried;
    // Not std::max: a NaN must not get lost.
    task.loss = loss <= task.loss ? task.loss : (loss == loss ? loss : std::numeric_limits<double>::infinity());
    task.amplification = std::max(task.amplification, std::sqrt(largest));
  }

  GramWorkspace gram_work_;
  JacobiSvd svd_;
  SymmetricEigen eigen_;
  Buffer<double> grams_[2], triangles_[2], transforms_[2], small_, wt_, products_;
};

// The two register-blocked products that everything is made of.

// C (m x n) <- [C +] L R for L(i, k) = l[i * row + k * step], R row-major (depth x n). A tile of kRows x kColumns
// vectors of C stays in registers.
template <class T, std::size_t kRows, std::size_t kColumns>
inline void multiply_tile(const T* l, std::size_t row, std::size_t step, const T* r, std::size_t ldr, T* c,
                          std::size_t ldc, std::size_t depth, bool add) {
  using V = typename Lanes<T>::Type;
  constexpr std::size_t kLanes = sizeof(V) / sizeof(T);
  V sums[kRows][kColumns] = {};
  for (std::size_t k = 0; k < depth; ++k) {
    V right[kColumns];
#pragma GCC unroll 4
    for (std::size_t j = 0; j < kColumns; ++j) right[j] = load<V>(r + k * ldr + j * kLanes);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kRows; ++i) {
      const T left = l[i * row + k * step];
#pragma GCC unroll 4
      for (std::size_t j = 0; j < kColumns; ++j) sums[i][j] += right[j] * left;
    }
  }
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (std::size_t j = 0; j < kColumns; ++j) {
      T* out = c + i * ldc + j * kLanes;
      store(out, add ? load<V>(out) + sums[i][j] : sums[i][j]);
    }
  }
}

// Rows of a tile: as many as the registers hold, since few loads per multiplication matter most. With 32 registers
// 6 x 4 reaches 98 % of the peak where 8 x 2 reaches 80 %.
constexpr std::size_t kWidest = kVectorBytes == 64 ? 4 : 2;
constexpr std::size_t tile_rows(std::size_t columns) {
  return kVectorBytes == 64 ? (columns == 4 ? 6 : columns == 3 ? 8 : 12) : 6;
}

constexpr std::size_t half_tile(std::size_t rows) { return rows > 8 ? 8 : rows > 4 ? 4 : rows / 2; }

// Rows that are left over take the next smaller tile.
template <class T, std::size_t kColumns, std::size_t kRows>
inline void multiply_rows(const T* l, std::size_t row, std::size_t step, const T* r, std::size_t ldr, T* c,
                          std::size_t ldc, std::size_t m, std::size_t depth, bool add) {
  std::size_t i = 0;
  for (; i + kRows <= m; i += kRows)
    multiply_tile<T, kRows, kColumns>(l + i * row, row, step, r, ldr, c + i * ldc, ldc, depth, add);
  if constexpr (kRows > 1)
    if (i < m)
      multiply_rows<T, kColumns, half_tile(kRows)>(l + i * row, row, step, r, ldr, c + i * ldc, ldc, m - i, depth, add);
}

// n must be a multiple of the vector's lanes: rows are padded.
template <class T, std::size_t kColumns = kWidest>
inline void multiply(const T* l, std::size_t row, std::size_t step, const T* r, std::size_t ldr, T* c, std::size_t ldc,
                     std::size_t m, std::size_t depth, std::size_t n, bool add) {
  constexpr std::size_t kWidth = kColumns * Lanes<T>::kCount;
  std::size_t j = 0;
  for (; j + kWidth <= n; j += kWidth)
    multiply_rows<T, kColumns, tile_rows(kColumns)>(l, row, step, r + j, ldr, c + j, ldc, m, depth, add);
  if constexpr (kColumns > 1)
    if (j < n) multiply<T, kColumns - 1>(l, row, step, r + j, ldr, c + j, ldc, m, depth, n - j, add);
}

// The same for an L R that is symmetric, r x r: only what lies on and above the diagonal, and a little below, which is
// less the narrower the tile: the last rows of a block of columns are those of its last vector alone.
inline void upper_product(const double* l, std::size_t row, std::size_t step, const double* right, std::size_t ldr,
                          double* c, std::size_t ldc, std::size_t r, std::size_t depth, bool add) {
  constexpr std::size_t kColumns = 2, kWidth = kColumns * kDoubles;
  for (std::size_t j = 0; j < r; j += kWidth) {
    const std::size_t top = std::min(r, j + kDoubles), k = j + kDoubles;
    multiply<double, kColumns>(l, row, step, right + j, ldr, c + j, ldc, top, depth,
                               std::min(kWidth, round_up(r - j, kDoubles)), add);
    if (k < r)
      multiply<double, 1>(l + k * row, row, step, right + k, ldr, c + k * ldc + k, ldc, std::min(kDoubles, r - k),
                          depth, kDoubles, add);
  }
}

// Rows and columns of a tile of dot products.
constexpr std::size_t kTile = kVectorBytes == 64 ? 4 : 3;

// sums[i][j] += x_i * y_j lane by lane, a short chain of its own before it is added to a long one, over rows x_i and
// y_j of `length` values, a multiple of the lanes.
inline void dot_tile(const double* x, const double* y, std::size_t ld, std::size_t length, Vd* sums) {
  Vd kept[kTile][kTile] = {};
  for (std::size_t k = 0; k < length; k += kDoubles) {
    Vd right[kTile];
#pragma GCC unroll 4
    for (std::size_t j = 0; j < kTile; ++j) right[j] = load<Vd>(y + j * ld + k);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kTile; ++i) {
      const Vd left = load<Vd>(x + i * ld + k);
#pragma GCC unroll 4
      for (std::size_t j = 0; j < kTile; ++j) kept[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (std::size_t j = 0; j < kTile; ++j) sums[i * kTile + j] += kept[i][j];
}

// Gram matrices B^T B and A A^T in float64: products of the stored values are exact there, or for float32 off by less
// than the sum's own rounding. Pieces small enough to stay in the second-level cache are widened once and used r times.

struct GramWorkspace {
  Buffer<double> piece;
  Buffer<Vd> sums;
};

// Rows or columns of a piece: at least this many, and at least the root of all, so that neither the sum over a piece
// nor that over the pieces is longer than that. Even where every addition rounds the same way, the error is then 2
// sqrt(length) roundoffs.
inline std::size_t piece_length(std::size_t least, std::size_t length) {
  return std::max(least, static_cast<std::size_t>(std::sqrt(static_cast<double>(length))) + 1);
}

// Only on and above the diagonal: the rows [0, end of the block) of each block of columns.
inline void tall_gram(const Factor& b, double* gram, std::size_t ld, GramWorkspace& work) {
  const std::size_t rows = piece_length(64, b.length);
  double* piece = work.piece.reserve(rows * ld);
  std::memset(piece, 0, rows * ld * sizeof(double));
  for (std::size_t first = 0; first < b.length; first += rows) {
    const std::size_t count = std::min(rows, b.length - first);
    if (ld == b.r)
      widen(b.data, b.dtype, first * b.r, piece, count * b.r);
    else
      for (std::size_t k = 0; k < count; ++k) widen(b.data, b.dtype, (first + k) * b.r, piece + k * ld, b.r);
    upper_product(piece, 1, ld, piece, ld, gram, ld, b.r, count, true);
  }
}

inline void flat_gram(const Factor& a, double* gram, std::size_t ld, GramWorkspace& work) {
  const std::size_t tiles = (a.r + kTile - 1) / kTile, rows = tiles * kTile;
  const std::size_t columns = round_up(piece_length(256, a.length), kDoubles);
  // A vector of lanes beyond the row's end: rows a power of two apart would share the cache's few places.
  const std::size_t stride = columns + kDoubles;
  double* piece = work.piece.reserve(rows * stride);
  Vd* sums = work.sums.reserve(tiles * tiles * kTile * kTile);
  std::memset(piece, 0, rows * stride * sizeof(double));
  std::memset(sums, 0, tiles * tiles * kTile * kTile * sizeof(Vd));
  for (std::size_t first = 0; first < a.length; first += columns) {
    const std::size_t count = std::min(columns, a.length - first), padded = round_up(count, kDoubles);
    widen_columns(a, first, count, padded, piece, stride);
    for (std::size_t i = 0; i < tiles; ++i)
      for (std::size_t j = i; j < tiles; ++j)
        dot_tile(piece + i * kTile * stride, piece + j * kTile * stride, stride, padded,
                 sums + (i * tiles + j) * kTile * kTile);
  }
  for (std::size_t i = 0; i < a.r; ++i)
    for (std::size_t j = i; j < a.r; ++j)
      gram[i * ld + j] = sum(sums[(i / kTile * tiles + j / kTile) * kTile * kTile + i % kTile * kTile + j % kTile]);
}

// gram (r rows of ld values, zero beyond r) <- the factor's Gram matrix; false if the factor holds a NaN or an
// infinity.
inline bool gram(const Factor& factor, double* out, std::size_t ld, GramWorkspace& work) {
  std::fill(out, out + factor.r * ld, 0.0);
  if (factor.shape == Shape::tall)
    tall_gram(factor, out, ld, work);
  else
    flat_gram(factor, out, ld, work);
  bool finite = true;
  for (std::size_t i = 0; i < factor.r; ++i) {
    finite &= std::isfinite(out[i * ld + i]);
    for (std::size_t j = 0; j < i; ++j) out[i * ld + j] = out[j * ld + i];
    for (std::size_t j = factor.r; j < ld; ++j) out[i * ld + j] = 0;
  }
  return finite;
}

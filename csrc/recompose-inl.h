// A factor's basis times a small transform, streamed through pieces that stay in cache; in place if so wished, since
// a piece is widened before it is overwritten.

struct RecomposeWorkspace {
  Buffer<char> transform, piece, product, narrowed;
};

template <class T>
void recompose_as(RecomposeTask& task, RecomposeWorkspace& work) {
  // Of a tall and of a flat piece: 128 columns are four cache lines of a 16-bit row.
  constexpr std::size_t kLanes = Lanes<T>::kCount, kRows = 64, kColumns = 128;
  const Factor& basis = task.basis;
  const bool tall = basis.shape == Shape::tall;
  task.finite = true;
  const std::size_t most = (tall ? kRows * task.rank : kColumns) * size_of(task.out_dtype);
  char* narrowed = work.narrowed.reserve(most);
  // Elsewhere than in place, past the caches, which would read what is about to be overwritten.
  const auto put = [&](const T* from, std::size_t first, std::size_t n) {
    if (task.out == basis.data) {
      task.finite &= narrow(from, task.out, task.out_dtype, first, n);
    } else {
      task.finite &= narrow(from, narrowed, task.out_dtype, 0, n);
      stream(static_cast<char*>(task.out) + first * size_of(task.out_dtype), narrowed, n * size_of(task.out_dtype));
    }
  };
  if (tall) {
    const std::size_t ld = round_up(task.rank, kLanes);
    T* t = reinterpret_cast<T*>(work.transform.reserve(basis.r * ld * sizeof(T)));
    std::fill(t, t + basis.r * ld, T{0});
    for (std::size_t i = 0; i < basis.r; ++i)
      for (std::size_t j = 0; j < task.rank; ++j)
        t[i * ld + j] = static_cast<T>(task.transform[i * task.rank + j] * task.scale[j]);
    T* piece = reinterpret_cast<T*>(work.piece.reserve(kRows * basis.r * sizeof(T)));
    T* product = reinterpret_cast<T*>(work.product.reserve(kRows * ld * sizeof(T)));
    for (std::size_t first = 0; first < basis.length; first += kRows) {
      const std::size_t count = std::min(kRows, basis.length - first);
      widen(basis.data, basis.dtype, first * basis.r, piece, count * basis.r);
      multiply(piece, basis.r, 1, t, ld, product, ld, count, basis.r, ld, false);
      if (ld == task.rank)
        put(product, first * ld, count * ld);
      else
        for (std::size_t i = 0; i < count; ++i) put(product + i * ld, (first + i) * task.rank, task.rank);
    }
  } else {
    T* t = reinterpret_cast<T*>(work.transform.reserve(task.rank * basis.r * sizeof(T)));
    for (std::size_t i = 0; i < basis.r; ++i)
      for (std::size_t j = 0; j < task.rank; ++j)
        t[j * basis.r + i] = static_cast<T>(task.transform[i * task.rank + j] * task.scale[j]);
    T* piece = reinterpret_cast<T*>(work.piece.reserve(basis.r * kColumns * sizeof(T)));
    T* product = reinterpret_cast<T*>(work.product.reserve(task.rank * kColumns * sizeof(T)));
    for (std::size_t first = 0; first < basis.length; first += kColumns) {
      const std::size_t count = std::min(kColumns, basis.length - first), padded = round_up(count, kLanes);
      widen_columns(basis, first, count, padded, piece, kColumns);
      multiply(t, basis.r, 1, piece, kColumns, product, kColumns, task.rank, basis.r, padded, false);
      for (std::size_t i = 0; i < task.rank; ++i) put(product + i * kColumns, i * basis.length + first, count);
    }
  }
  stream_end();
}

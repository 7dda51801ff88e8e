// A factor's basis times a small transform, streamed through pieces that stay in cache; in place if so wished, since
// a piece is widened before it is overwritten.

struct RecomposeWorkspace {
  Buffer<char> transform, piece, product;
};

template <class T>
void recompose_as(RecomposeTask& task, RecomposeWorkspace& work) {
  constexpr std::size_t kLanes = Lanes<T>::kCount;
  const Factor& basis = task.basis;
  const bool tall = basis.shape == Shape::tall;
  task.finite = true;
  if (tall) {
    const std::size_t ld = round_up(task.rank, kLanes), rows = 64;
    T* t = reinterpret_cast<T*>(work.transform.reserve(basis.r * ld * sizeof(T)));
    std::fill(t, t + basis.r * ld, T{0});
    for (std::size_t i = 0; i < basis.r; ++i)
      for (std::size_t j = 0; j < task.rank; ++j)
        t[i * ld + j] = static_cast<T>(task.transform[i * task.rank + j] * task.scale[j]);
    T* piece = reinterpret_cast<T*>(work.piece.reserve(rows * basis.r * sizeof(T)));
    T* product = reinterpret_cast<T*>(work.product.reserve(rows * ld * sizeof(T)));
    for (std::size_t first = 0; first < basis.length; first += rows) {
      const std::size_t count = std::min(rows, basis.length - first);
      widen(basis.data, basis.dtype, first * basis.r, piece, count * basis.r);
      multiply(piece, basis.r, 1, t, ld, product, ld, count, basis.r, ld, false);
      if (ld == task.rank)
        task.finite &= narrow(product, task.out, task.out_dtype, first * ld, count * ld);
      else
        for (std::size_t i = 0; i < count; ++i)
          task.finite &= narrow(product + i * ld, task.out, task.out_dtype, (first + i) * task.rank, task.rank);
    }
  } else {
    // Four cache lines of a 16-bit row.
    const std::size_t columns = 128, ld = columns;
    T* t = reinterpret_cast<T*>(work.transform.reserve(task.rank * basis.r * sizeof(T)));
    for (std::size_t i = 0; i < basis.r; ++i)
      for (std::size_t j = 0; j < task.rank; ++j)
        t[j * basis.r + i] = static_cast<T>(task.transform[i * task.rank + j] * task.scale[j]);
    T* piece = reinterpret_cast<T*>(work.piece.reserve(basis.r * ld * sizeof(T)));
    T* product = reinterpret_cast<T*>(work.product.reserve(task.rank * ld * sizeof(T)));
    for (std::size_t first = 0; first < basis.length; first += columns) {
      const std::size_t count = std::min(columns, basis.length - first), padded = round_up(count, kLanes);
      widen_columns(basis, first, count, padded, piece, ld);
      if (task.out != basis.data)
        for (std::size_t i = 0; i < task.rank; ++i)
          prefetch<1>(element(task.out, task.out_dtype, i * basis.length + first), count * size_of(task.out_dtype));
      multiply(t, basis.r, 1, piece, ld, product, ld, task.rank, basis.r, padded, false);
      for (std::size_t i = 0; i < task.rank; ++i)
        task.finite &= narrow(product + i * ld, task.out, task.out_dtype, i * basis.length + first, count);
    }
  }
}

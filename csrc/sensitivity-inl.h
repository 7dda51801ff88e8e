// Elementwise products summed over the tokens of a segment: p and q are read once, sums are in float32, in the order of
// the tokens in short runs whose sums are added in order: the error grows with the runs, not with the tokens.

inline void segment_products_of(const SensitivityTask& task, std::size_t segment) {
  constexpr std::size_t kRun = 64, kStrip = 4 * kFloats;
  const std::size_t r = task.r;
  const auto begin = static_cast<std::size_t>(task.starts[segment]),
             end = static_cast<std::size_t>(task.starts[segment + 1]);
  float* out = task.out + segment * r;
  std::fill(out, out + r, 0.0f);
  for (std::size_t first = begin; first < end; first += kRun) {
    const std::size_t last = std::min(first + kRun, end);
    for (std::size_t k = 0; k < r; k += kStrip) {
      const std::size_t count = std::min(kStrip, r - k);
      float sums[kStrip] = {};
      for (std::size_t n = first; n < last; ++n) {
        float p[kStrip] = {}, q[kStrip] = {};
        widen(task.p, task.dtype, n * r + k, p, count);
        widen(task.q, task.dtype, n * r + k, q, count);
        for (std::size_t i = 0; i < kStrip; ++i) sums[i] += p[i] * q[i];
      }
      for (std::size_t i = 0; i < count; ++i) out[k + i] += sums[i];
    }
  }
}

// Elementwise products summed over the tokens of a segment: p and q are read once, sums are in float32, in the order of
// the tokens, in runs of at least 64 and of the root of all, whose sums are then added: an error of twice the longer of
// the two in roundoffs, rather than of all tokens.

struct Float32 {
  using Stored = float;
  static Vf at(const float* p) { return load<Vf>(p); }
  // Two vectors' values, in any order: what costs least.
  static void two(const float* p, Vf* out) { out[0] = at(p), out[1] = at(p + kFloats); }
};

template <class Half>
struct As16 {
  using Stored = std::uint16_t;
  static Vf at(const std::uint16_t* p) { return Half::widen(__builtin_convertvector(load<HalfVu>(p), Vu)); }
  static void two(const std::uint16_t* p, Vf* out) {
    const Vu pairs = load<Vu>(p);
    out[0] = Half::widen(pairs & 0xffffu), out[1] = Half::widen(pairs >> 16);
  }
};

// out (kVectors vectors) += the sums over `tokens` rows that are r values apart.
template <class Type, std::size_t kVectors>
inline void sum_products(const typename Type::Stored* p, const typename Type::Stored* q, std::size_t r,
                         std::size_t tokens, float* out) {
  const std::size_t run = piece_length(64, tokens);
  for (std::size_t first = 0; first < tokens; first += run) {
    Vf sums[kVectors] = {};
    for (std::size_t n = first; n < std::min(first + run, tokens); ++n)
      for (std::size_t v = 0; v < kVectors; ++v)
        sums[v] += Type::at(p + n * r + v * kFloats) * Type::at(q + n * r + v * kFloats);
    for (std::size_t v = 0; v < kVectors; ++v) store(out + v * kFloats, load<Vf>(out + v * kFloats) + sums[v]);
  }
}

template <class Type>
inline void segment_products_as(const SensitivityTask& task, std::size_t begin, std::size_t tokens, float* out) {
  using Stored = typename Type::Stored;
  const std::size_t r = task.r;
  const Stored *p = static_cast<const Stored*>(task.p) + begin * r, *q = static_cast<const Stored*>(task.q) + begin * r;
  std::size_t k = 0;
  for (; k + 4 * kFloats <= r; k += 4 * kFloats) sum_products<Type, 4>(p + k, q + k, r, tokens, out + k);
  for (; k + kFloats <= r; k += kFloats) sum_products<Type, 1>(p + k, q + k, r, tokens, out + k);
  if (k == r) return;
  // The last columns, less than a vector of them: read with the next row's first, except where there is none.
  const std::size_t values = tokens * r;
  const std::size_t whole = values < k + kFloats ? 0 : (values - k - kFloats) / r + 1;
  float sums[kFloats] = {};
  sum_products<Type, 1>(p + k, q + k, r, whole, sums);
  for (std::size_t n = whole; n < tokens; ++n) {
    Stored last_p[kFloats] = {}, last_q[kFloats] = {};
    std::memcpy(last_p, p + n * r + k, (r - k) * sizeof(Stored));
    std::memcpy(last_q, q + n * r + k, (r - k) * sizeof(Stored));
    sum_products<Type, 1>(last_p, last_q, 0, 1, sums);
  }
  std::memcpy(out + k, sums, (r - k) * sizeof(float));
}

inline void segment_products_of(const SensitivityTask& task, std::size_t segment) {
  const auto begin = static_cast<std::size_t>(task.starts[segment]);
  const std::size_t tokens = static_cast<std::size_t>(task.starts[segment + 1]) - begin;
  float* out = task.out + segment * task.r;
  std::fill(out, out + task.r, 0.0f);
  switch (task.dtype) {
    case DType::bfloat16:
      return segment_products_as<As16<BFloat16>>(task, begin, tokens, out);
    case DType::float16:
      return segment_products_as<As16<Float16>>(task, begin, tokens, out);
    default:
      return segment_products_as<Float32>(task, begin, tokens, out);
  }
}

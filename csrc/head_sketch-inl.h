// What a TensorSketch of the head's gradient needs: one pass over the logits, and sparse circular convolutions.

// A row of logits is read in blocks, whose maxima bound the K-th largest from below: only blocks that reach it are
// looked into again.
constexpr std::size_t kBlock = 64, kAhead = 16;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <std::size_t kBytes>
inline float largest_of(typename Vector<float, kBytes>::Type v) {
  if constexpr (kBytes == 4 * sizeof(float)) {
    const float even = v[0] > v[2] ? v[0] : v[2], odd = v[1] > v[3] ? v[1] : v[3];
    return even > odd ? even : odd;
  } else {
    typename Vector<float, kBytes / 2>::Type half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return largest_of<kBytes / 2>(half[0] > half[1] ? half[0] : half[1]);
  }
}

// exp(x) for -87 < x <= 0 within 3 + |x| / 4 roundoffs, and at least exp(-87) for what is below; NaN stays. By 2^(n +
// r) with |r| <= 1 / 2, where 2^r is the polynomial of degree 5 with p(0) = 1 that is off least, by 1.1e-7 at most.
inline Vf exp_of(Vf x) {
  constexpr float kShift = 0x1.8p23f, kLog2e = 0x1.715476p0f;  // what is added to the shift is rounded to an integer
  const Vf least = Vf{} - 87.0f;
  x = least > x ? least : x;
  const Vf shifted = x * kLog2e + kShift, r = x * kLog2e - (shifted - kShift);
  Vf y = r * 0x1.5bbap-10f + 0x1.3cea88p-7f;
  y = y * r + 0x1.c6b754p-5f;
  y = y * r + 0x1.ebf9bcp-3f;
  y = y * r + 0x1.62e42ap-1f;
  y = y * r + 1.0f;
  return bits<Vf>(bits<Vu>(y) + (bits<Vu>(shifted) << 23));
}

// The sum of exp(x - largest) over what was added, whose largest finite value that is.
struct LogSumExp {
  float largest = kLowest;
  Vf total{};

  // Returns the block's largest value; a NaN is none, but stays in the sum.
  template <class Type>
  float add(const typename Type::Stored* block) {
    constexpr std::size_t kVectors = kBlock / kFloats;
    Vf x[kVectors], most = Vf{} - kInfinity;
    for (std::size_t v = 0; v < kVectors; v += 2) Type::two(block + v * kFloats, x + v);
    for (std::size_t v = 0; v < kVectors; ++v) most = x[v] > most ? x[v] : most;
    const float found = largest_of<kVectorBytes>(most);
    if (found > largest) {
      total *= exp_of(Vf{} + (largest - found))[0];
      largest = found;
    }
    for (std::size_t v = 0; v < kVectors; ++v) x[v] = exp_of(x[v] - largest);
    for (std::size_t step = 1; step < kVectors; step *= 2)
      for (std::size_t v = 0; v < kVectors; v += 2 * step) x[v] += x[v + step];
    total += x[0];
    return found;
  }

  float value() const {
    double sum = 0;
    for (std::size_t i = 0; i < kFloats; ++i) sum += static_cast<double>(total[i]);
    if (sum < 0.5) return -kInfinity;  // the largest itself counts 1
    return static_cast<float>(static_cast<double>(largest) + std::log(sum));
  }
};

// Numbers in the order of the floats that they stand for.
inline std::uint32_t rank_of(float x) {
  const auto u = bits<std::uint32_t>(x);
  return u >> 31 ? ~u : u | 0x80000000u;
}
inline float float_of(std::uint32_t rank) { return bits<float>(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

// A float that at least k of the first n are not below, and few more than k; n is a multiple of kFloats, none is NaN.
// By bisection, which has no branches to mispredict but its own, to 4096 units in the last place: less than bfloat16's.
inline float bound_of(const float* x, std::size_t n, std::size_t k) {
  std::uint32_t low = rank_of(-kInfinity), high = rank_of(kInfinity) + 1;
  while (high - low > 4096) {
    const std::uint32_t middle = low + (high - low) / 2;
    const float bound = float_of(middle);
    Vu counts{};
    for (std::size_t i = 0; i < n; i += kFloats) counts += load<Vf>(x + i) >= bound ? Vu{} + 1 : Vu{};
    std::uint32_t lanes[kFloats];
    store(lanes, counts);
    const std::size_t count = std::accumulate(lanes, lanes + kFloats, std::size_t{0});
    (count < k ? high : low) = middle;
    if (count >= k && count <= k + k / 8) break;
  }
  return float_of(low);
}

template <class Type>
inline void top_logits_as(const TopLogitsTask& task, std::size_t row) {
  thread_local Buffer<float> floats;
  thread_local Buffer<std::uint64_t> keys_buffer;
  const std::size_t n = task.vocabulary, first = row * n, blocks = (n + kBlock - 1) / kBlock;
  const std::size_t padded = round_up(blocks, kFloats), top = task.top;
  const auto* x = static_cast<const typename Type::Stored*>(task.logits) + first;
  float *maxima = floats.reserve(padded + kBlock), *values = maxima + padded;
  std::uint64_t *keys = keys_buffer.reserve(2 * n), *ordered = keys + n;

  LogSumExp sum;
  for (std::size_t b = 0; b < n / kBlock; ++b) {
    prefetch<0>(x + (b + kAhead) * kBlock, kBlock * sizeof *x);
    maxima[b] = sum.add<Type>(x + b * kBlock);
  }
  if (const std::size_t left = n % kBlock; left > 0) {
    widen(task.logits, task.dtype, first + n - left, values, left);
    std::fill(values + left, values + kBlock, -kInfinity);
    maxima[blocks - 1] = sum.add<Float32>(values);
  }
  std::fill(maxima + blocks, maxima + padded, -kInfinity);

  // Of a larger logit the key is larger, of equal ones that of the lowest id; -0 is 0.
  const float least = blocks < top ? -kInfinity : bound_of(maxima, padded, top);
  std::size_t count = 0;
  // Which blocks and lanes those are cannot be predicted: no branches, but for a loop over the few lanes of a block.
  using Bytes = signed char __attribute__((vector_size(kFloats)));
  const auto look = [&](const float* block, std::size_t id) {
    std::uint64_t reached = 0;
    for (std::size_t v = 0; v < kBlock; v += kFloats) {
      const Bytes lanes = __builtin_convertvector(load<Vf>(block + v) >= least, Bytes);
      for (std::size_t i = 0; i < kFloats; i += 8) {
        std::uint64_t bytes = 0;
        std::memcpy(&bytes, reinterpret_cast<const char*>(&lanes) + i, std::min<std::size_t>(kFloats, 8));
        // A bit of each byte, moved together by the product.
        reached |= ((bytes & 0x0101010101010101u) * 0x0102040810204080u >> 56) << (v + i);
      }
    }
    if (n - id < kBlock) reached &= (std::uint64_t{1} << (n - id)) - 1;
    for (; reached != 0; reached &= reached - 1) {
      const auto i = static_cast<std::size_t>(__builtin_ctzll(reached));
      keys[count++] = static_cast<std::uint64_t>(rank_of(block[i] + 0.0f)) << 32 | ~static_cast<std::uint32_t>(id + i);
    }
  };
  std::uint64_t* chosen = ordered;  // not in use yet
  std::size_t chosen_count = 0;
  for (std::size_t b = 0; b < n / kBlock; ++b) {
    chosen[chosen_count] = b;
    chosen_count += maxima[b] >= least;
  }
  for (std::size_t c = 0; c < chosen_count; ++c) {
    const std::size_t id = chosen[c] * kBlock;
    float block[kBlock];
    for (std::size_t i = 0; i < kBlock; i += kFloats) store(block + i, Type::at(x + id + i));
    look(block, id);
  }
  if (n % kBlock > 0) look(values, n - n % kBlock);
  std::copy(keys, keys + count, ordered);
  std::uint64_t last = 0;
  if (count > top) {
    std::nth_element(ordered, ordered + top - 1, ordered + count, std::greater<std::uint64_t>());
    last = ordered[top - 1];
  }

  task.logsumexp[row] = sum.value();
  task.gold[row] = -kInfinity;
  if (const std::int64_t label = task.labels[row]; label != kElsewhere)
    widen(task.logits, task.dtype, first + static_cast<std::size_t>(label), task.gold + row, 1);
  float* out = task.values + row * top;
  std::int64_t* ids = task.ids + row * top;
  std::size_t k = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (keys[i] < last) continue;
    out[k] = float_of(static_cast<std::uint32_t>(keys[i] >> 32));
    ids[k++] = ~static_cast<std::uint32_t>(keys[i]);
  }
  for (; k < top; ++k) {  // where a NaN is no candidate
    out[k] = std::numeric_limits<float>::quiet_NaN();
    ids[k] = 0;
  }
}

inline void top_logits_of(const TopLogitsTask& task, std::size_t row) {
  if (task.labels[row] == kIgnored) {
    task.logsumexp[row] = task.gold[row] = 0;
    std::fill_n(task.values + row * task.top, task.top, 0.0f);
    std::fill_n(task.ids + row * task.top, task.top, std::int64_t{0});
    return;
  }
  switch (task.dtype) {
    case DType::bfloat16:
      return top_logits_as<As16<BFloat16>>(task, row);
    case DType::float16:
      return top_logits_as<As16<Float16>>(task, row);
    default:
      return top_logits_as<Float32>(task, row);
  }
}

// As few errors are not 0, a convolution is as many rotated copies of s_h, added up in registers, of which a strip of z
// at a time; no transforms. s_h lies twice in a row, so that a rotation is a start.
inline void tensor_sketch_of(const TensorSketchTask& task, std::size_t run) {
  constexpr std::size_t kVectors = 8, kStrip = kVectors * kFloats;
  thread_local Buffer<float> buffer;
  const std::size_t m = task.m, padded = round_up(m, kStrip), top = round_up(task.top, kFloats);
  float* z = buffer.reserve(padded + m + padded + top + kFloats + task.features);
  float *twice = z + padded, *errors = twice + m + padded, *hidden = errors + top + kFloats;
  std::fill(z, hidden, 0.0f);
  const std::size_t end = std::min(task.tokens, (run + 1) * kTokensOfSketch);
  for (std::size_t t = run * kTokensOfSketch; t < end; ++t) {
    const std::int64_t label = task.labels[t], *ids = task.ids + t * task.top;
    if (label == kIgnored) continue;
    std::memcpy(errors, task.values + t * task.top, task.top * sizeof *errors);
    errors[task.top] = task.gold[t];
    for (std::size_t k = 0; k < task.top + 1; k += kFloats)
      store(errors + k, exp_of(load<Vf>(errors + k) - task.logsumexp[t]));
    bool beside = true;
    for (std::size_t k = 0; k < task.top; ++k) {
      if (ids[k] == label) errors[k] -= 1, beside = false;
      errors[k] *= task.sign_e[ids[k]];
    }
    errors[task.top] = (errors[task.top] - 1) * task.sign_e[label];

    widen(task.hidden, task.dtype, t * task.features, hidden, task.features);
    std::fill(twice, twice + m, 0.0f);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < task.features; ++i) twice[task.bucket_h[i]] += task.sign_h[i] * hidden[i];
    std::copy(twice, twice + m, twice + m);
    for (std::size_t i = 0; i < m; i += kStrip) {
      Vf sums[kVectors] = {};
      for (std::size_t k = 0; k < task.top + beside; ++k) {
        const auto bucket = static_cast<std::size_t>(task.bucket_e[k < task.top ? ids[k] : label]);
        const float* rotated = twice + m + i - bucket;
        for (std::size_t v = 0; v < kVectors; ++v) sums[v] += errors[k] * load<Vf>(rotated + v * kFloats);
      }
      for (std::size_t v = 0; v < kVectors; ++v) store(z + i + v * kFloats, load<Vf>(z + i + v * kFloats) + sums[v]);
    }
  }
  std::copy(z, z + m, task.sums + run * m);
}

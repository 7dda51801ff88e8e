// A spline on every element of a tensor, and its gradients: x is read once, the result written once. The weights of the
// knots stay in a block that fits into the first-level cache, and are summed there, knot by knot.

using Vi = Lanes<std::int32_t>::Type;

constexpr std::size_t kSplineBlock = 512;  // elements

inline Vf clipped(Vf x, float low, float high) {  // NaN stays
  x = x < low ? Vf{} + low : x;
  return x > high ? Vf{} + high : x;
}

inline Vf floats(Vi i) { return __builtin_convertvector(i, Vf); }

// The whole part of x, at least 0 and at most `last`; 0 of NaN.
inline Vi whole(Vf x, float last) {
  x = x > 0.0f ? x : Vf{};
  x = x < last ? x : Vf{} + last;
  return __builtin_convertvector(x, Vi);
}

// Entries of a table that are looked up within registers: two vectors of them. By 16-byte instruction sets, which have
// no such instruction, they are looked up one by one.
constexpr std::size_t kEntries = kVectorBytes >= 32 ? 2 * kFloats : 0;

#if defined(__x86_64__)
// Entries i of the table low, high. Written with intrinsics: Clang has no builtin for it.
template <class V, class I>
inline V select(V low, V high, I i) {
  if constexpr (sizeof(V) == 64)
    return (V)_mm512_permutex2var_ps((__m512)low, (__m512i)i, (__m512)high);
  else  // each half by the lowest bits, then one of them by bit 3, moved to the sign
    return (V)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)low, (__m256i)i),
                               _mm256_permutevar8x32_ps((__m256)high, (__m256i)i), (__m256)(i << 28));
}
#endif

template <bool kInRegisters>
inline Vf lookup(const float* table, Vi i) {
#if defined(__x86_64__)
  if constexpr (kInRegisters && kEntries > 0) return select(load<Vf>(table), load<Vf>(table + kFloats), i);
#endif
  float lanes[kFloats];
  for (std::size_t lane = 0; lane < kFloats; ++lane) lanes[lane] = table[i[lane]];
  return load<Vf>(lanes);
}

// e^x for |x| < 80, to two roundoffs: 2^n e^r by Taylor's polynomial, |r| <= log(2) / 2.
inline Vf exponential(Vf x) {
  const Vf scaled = x * 0x1.715476p+0f;
  const Vi n = __builtin_convertvector(scaled + (scaled < 0.0f ? Vf{} - 0.5f : Vf{} + 0.5f), Vi);
  const Vf r = (x - floats(n) * 0x1.62e4p-1f) - floats(n) * 0x1.7f7d1cp-20f;
  Vf sum = Vf{} + 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + c;
  return sum * bits<Vf>((n + 127) << 23);
}

// What a method leaves of an element for its gradients: from knot `first` on, the weights of a few values, and dphi/ds.
template <std::size_t kWeights>
struct Local {
  Vi first;
  Vf weights[kWeights], slope;
};

// Per piece the intercept and the slope, so that of x near 0 all digits are kept.
template <bool kInRegisters>
class Piecewise {
 public:
  static constexpr std::size_t kWeights = 2, kBefore = 0;  // of them, before the nearest knot
  static std::size_t entries(const SplineTask& task) { return task.knots - 1; }

  Piecewise(const SplineTask& task, float* tables, std::size_t stride)
      : intercepts_(tables), slopes_(tables + stride), last_(static_cast<float>(task.knots - 2)) {
    const double dk = (task.k_max - task.k_min) / static_cast<double>(task.knots - 1);
    for (std::size_t i = 0; i + 1 < task.knots; ++i) {
      const double slope = (task.values[i + 1] - task.values[i]) / dk;
      tables[i] = static_cast<float>(task.values[i] - slope * (task.k_min + static_cast<double>(i) * dk));
      tables[stride + i] = static_cast<float>(slope);
    }
    const bool saturates = !task.extrapolate;
    constexpr float kNone = std::numeric_limits<float>::infinity();
    low_ = saturates ? static_cast<float>(task.k_min) : -kNone;
    high_ = saturates ? static_cast<float>(task.k_max) : kNone;
    rate_ = static_cast<float>(1 / dk);
    offset_ = static_cast<float>(-task.k_min / dk);
  }

  Vf value(Vf s) const {
    s = clipped(s, low_, high_);
    const Vi i = whole(s * rate_ + offset_, last_);
    return lookup<kInRegisters>(intercepts_, i) + lookup<kInRegisters>(slopes_, i) * s;
  }

  Local<kWeights> local(Vf s) const {
    const Vf inside = clipped(s, low_, high_), u = inside * rate_ + offset_;
    const Vi i = whole(u, last_);
    const Vf t = u - floats(i), slope = lookup<kInRegisters>(slopes_, i);
    return {i, {1.0f - t, t}, inside == s ? slope : Vf{}};
  }

 private:
  const float *intercepts_, *slopes_;
  float last_, low_, high_, rate_, offset_;
};

// Softmax over the knots: two on either side of the nearest, at i = u - t, have weights exp(-(t - d)^2 / c), which are
// exp(2 t / c)^d exp(-d^2 / c) of the nearest's; those further away are below a roundoff.
template <bool kInRegisters>
class Soft {
 public:
  static constexpr std::size_t kWeights = 5, kBefore = 2;
  static std::size_t entries(const SplineTask& task) { return task.knots + kWeights - 1; }

  Soft(const SplineTask& task, float* tables, std::size_t)
      : values_(tables), last_(static_cast<float>(task.knots - 1)) {
    const double dk = (task.k_max - task.k_min) / static_cast<double>(task.knots - 1);
    for (std::size_t i = 0; i < entries(task); ++i) {
      const bool is_knot = i >= kBefore && i < kBefore + task.knots;
      tables[i] = is_knot ? static_cast<float>(task.values[i - kBefore]) : 0.0f;
    }
    rate_ = static_cast<float>(1 / dk);
    offset_ = static_cast<float>(-task.k_min / dk);
    power_ = static_cast<float>(2 / task.softness);
    near_ = static_cast<float>(std::exp(-1 / task.softness));
    far_ = static_cast<float>(std::exp(-4 / task.softness));
    steepness_ = static_cast<float>(2 / (task.softness * dk));
  }

  Vf value(Vf s) const { return average(s).mean; }

  Local<kWeights> local(Vf s) const {
    const Average a = average(s);
    Local<kWeights> found{a.nearest, {}, Vf{}};
    for (std::size_t d = 0; d < kWeights; ++d) {
      found.weights[d] = a.weights[d];
      found.slope += a.weights[d] * (static_cast<float>(d) - 2.0f) * (a.values[d] - a.mean);
    }
    found.slope *= steepness_;
    return found;
  }

 private:
  struct Average {
    Vi nearest;
    Vf weights[kWeights], values[kWeights], mean;
  };

  Average average(Vf s) const {
    // Three steps beyond the grid the last knot is alone.
    const Vf u = clipped(s * rate_ + offset_, -3.0f, last_ + 3.0f);
    Average a;
    a.nearest = whole(u + 0.5f, last_);
    const Vf i = floats(a.nearest), q = exponential((u - i) * power_), inverse = 1.0f / q;
    a.weights[0] = i > 1.5f ? far_ * inverse * inverse : Vf{};
    a.weights[1] = i > 0.5f ? near_ * inverse : Vf{};
    a.weights[2] = Vf{} + 1.0f;
    a.weights[3] = i < last_ - 0.5f ? near_ * q : Vf{};
    a.weights[4] = i < last_ - 1.5f ? far_ * q * q : Vf{};
    Vf total{};
    for (const Vf& weight : a.weights) total += weight;
    a.mean = Vf{};
    for (std::size_t d = 0; d < kWeights; ++d) {
      a.weights[d] /= total;
      a.values[d] = lookup<kInRegisters>(values_, a.nearest + static_cast<std::int32_t>(d));
      a.mean += a.weights[d] * a.values[d];
    }
    return a;
  }

  const float* values_;
  float last_, rate_, offset_, power_, near_, far_, steepness_;
};

// Halves are added until one lane is left.
template <std::size_t kBytes>
inline float sum_of_floats(typename Vector<float, kBytes>::Type v) {
  if constexpr (kBytes == sizeof(float)) {
    return v[0];
  } else {
    typename Vector<float, kBytes / 2>::Type half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return sum_of_floats<kBytes / 2>(half[0] + half[1]);
  }
}

struct SplineWorkspace {
  Buffer<float> tables, blocks;
  Buffer<std::int32_t> firsts;
};

template <class Method>
class SplineChunk {
 public:
  SplineChunk(const SplineTask& task, SplineWorkspace& work) : task_(task), work_(work), method_(made(task, work)) {
    constexpr float kNone = std::numeric_limits<float>::infinity();
    low_ = task.clamp ? static_cast<float>(task.k_min) : -kNone;
    high_ = task.clamp ? static_cast<float>(task.k_max) : kNone;
    s_in_ = static_cast<float>(task.s_in);
    s_out_ = static_cast<float>(task.s_out);
    slope_ = static_cast<float>(task.s_in * task.s_out);
  }

  void forward(std::size_t begin, std::size_t end) {
    float *x = work_.blocks.reserve(2 * kSplineBlock), *base = x + kSplineBlock;
    for (std::size_t first = begin, n; first < end; first += n) {
      n = std::min(kSplineBlock, end - first);
      read(task_.x, task_.x_dtype, first, x, n);
      for (std::size_t i = 0; i < n; i += kFloats)
        store(x + i, s_out_ * method_.value(clipped(load<Vf>(x + i), low_, high_) * s_in_));
      if (task_.y != nullptr) {
        read(task_.y, task_.y_dtype, first, base, n);
        for (std::size_t i = 0; i < n; i += kFloats) store(x + i, load<Vf>(x + i) + load<Vf>(base + i));
      }
      narrow(x, task_.out, task_.y_dtype, first, n);
    }
  }

  // sums (knots + 1) <- of dy w_i for every knot i, and of dy dphi/ds clamp(x).
  void backward(std::size_t begin, std::size_t end, double* sums) {
    float* x = work_.blocks.reserve((2 + Method::kWeights) * kSplineBlock);
    float *dy = x + kSplineBlock, *weighted = dy + kSplineBlock;
    std::int32_t* firsts = work_.firsts.reserve(kSplineBlock);
    std::fill(sums, sums + task_.knots + 1, 0.0);
    for (std::size_t first = begin, n; first < end; first += n) {
      n = std::min(kSplineBlock, end - first);
      read(task_.x, task_.x_dtype, first, x, n);
      read(task_.y, task_.y_dtype, first, dy, n);
      Vi lowest = Vi{} + std::numeric_limits<std::int32_t>::max(), highest{};
      Vf inner{};
      for (std::size_t i = 0; i < n; i += kFloats) {
        const Vf given = load<Vf>(x + i), up = load<Vf>(dy + i), inside = clipped(given, low_, high_);
        const auto local = method_.local(inside * s_in_);
        const Vf ds = up * local.slope;
        inner += ds * inside;
        store(x + i, given == inside ? ds * slope_ : Vf{});
        store(firsts + i, local.first);
        for (std::size_t d = 0; d < Method::kWeights; ++d)
          store(weighted + d * kSplineBlock + i, up * local.weights[d]);
        lowest = local.first < lowest ? local.first : lowest;
        highest = local.first > highest ? local.first : highest;
      }
      narrow(x, task_.out, task_.x_dtype, first, n);
      sums[task_.knots] += sum_of_floats<kVectorBytes>(inner);
      add(firsts, weighted, n, lowest, highest, sums);
    }
  }

 private:
  static Method made(const SplineTask& task, SplineWorkspace& work) {
    const std::size_t stride = std::max(Method::entries(task), 2 * kFloats);
    float* tables = work.tables.reserve(2 * stride);
    std::fill(tables, tables + 2 * stride, 0.0f);
    return Method(task, tables, stride);
  }

  // In float, and zeros up to a whole vector.
  static void read(const void* data, DType dtype, std::size_t first, float* out, std::size_t n) {
    widen(data, dtype, first, out, n);
    std::fill(out + n, out + round_up(n, kFloats), 0.0f);
  }

  // Knot by knot, of those that occur, so that the sums are in registers.
  void add(const std::int32_t* firsts, const float* weighted, std::size_t n, Vi lowest, Vi highest, double* sums) {
    std::int32_t low = lowest[0], high = highest[0];
    for (std::size_t lane = 1; lane < kFloats; ++lane) {
      low = std::min(low, lowest[lane]);
      high = std::max(high, highest[lane]);
    }
    for (std::int32_t knot = low; knot <= high; ++knot) {
      Vf found[Method::kWeights] = {};
      for (std::size_t i = 0; i < n; i += kFloats) {
        const Vi first = load<Vi>(firsts + i);
        for (std::size_t d = 0; d < Method::kWeights; ++d) {
          const Vf term = load<Vf>(weighted + d * kSplineBlock + i);
          found[d] += first == knot ? term : Vf{};
        }
      }
      for (std::size_t d = 0; d < Method::kWeights; ++d) {
        const std::size_t at = static_cast<std::size_t>(knot) + d;  // counted from kBefore knots before the first
        if (at >= Method::kBefore && at - Method::kBefore < task_.knots)
          sums[at - Method::kBefore] += sum_of_floats<kVectorBytes>(found[d]);
      }
    }
  }

  const SplineTask& task_;
  SplineWorkspace& work_;
  Method method_;
  float low_, high_, s_in_, s_out_, slope_;
};

template <class Method>
inline void spline_as(const SplineTask& task, std::size_t begin, std::size_t end, double* sums) {
  thread_local SplineWorkspace work;
  SplineChunk<Method> chunk(task, work);
  sums == nullptr ? chunk.forward(begin, end) : chunk.backward(begin, end, sums);
}

inline void spline_of(const SplineTask& task, std::size_t begin, std::size_t end, double* sums) {
  const bool in_registers = (task.soft ? Soft<true>::entries(task) : Piecewise<true>::entries(task)) <= kEntries;
  if (task.soft)
    (in_registers ? spline_as<Soft<true>> : spline_as<Soft<false>>)(task, begin, end, sums);
  else
    (in_registers ? spline_as<Piecewise<true>> : spline_as<Piecewise<false>>)(task, begin, end, sums);
}

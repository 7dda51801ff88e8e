// Between the stored types and float or double, a row at a time. Bit arithmetic for the two 16-bit types: exact,
// subnormal numbers and all, on every instruction set.

struct BFloat16 {
  static constexpr std::uint32_t kInfinity = 0x7f80;

  static Vf widen(Vu h) { return bits<Vf>(h << 16); }

  // Rounded to nearest, ties to even: the 16 bits in the low half of each lane.
  static Vu narrow(Vf x) {
    const Vu u = bits<Vu>(x);
    const Vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? Vu{} + 0x7fc0u : rounded;  // a NaN's payload would carry into the sign
  }
};

struct Float16 {
  static constexpr std::uint32_t kInfinity = 0x7c00;

  static Vf widen(Vu h) {
    const Vu shifted = (h & 0x7fffu) << 13;
    const Vu normal = shifted + (112u << 23);
    // A subnormal fraction becomes that of a normal number with one more leading bit, which is then taken off.
    const Vu subnormal = bits<Vu>(bits<Vf>(shifted + (113u << 23)) - 0x1p-14f);
    const Vu special = shifted | 0x7f800000u;
    const Vu magnitude = (h & 0x7c00u) == 0 ? subnormal : ((h & 0x7c00u) == 0x7c00u ? special : normal);
    return bits<Vf>(magnitude | ((h & 0x8000u) << 16));
  }

  static Vu narrow(Vf x) {
    const Vu u = bits<Vu>(x), magnitude = u & 0x7fffffffu;
    const Vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves the subnormal's ten bits, rounded, at the end of the fraction.
    const Vu subnormal = bits<Vu>(bits<Vf>(magnitude) + 0.5f) - (126u << 23);
    const Vu special = magnitude > 0x7f800000u ? Vu{} + 0x7e00u : Vu{} + 0x7c00u;
    const Vu h = magnitude < (113u << 23) ? subnormal : (magnitude >= (143u << 23) ? special : normal);
    return h | ((u >> 16) & 0x8000u);
  }
};

template <class To, class From>
inline void cast_row(const From* x, To* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<To>(x[i]);
}

template <class Half>
inline void widen_row(const std::uint16_t* x, float* out, std::size_t n) {
  std::size_t i = 0;
  for (; i + kFloats <= n; i += kFloats) store(out + i, Half::widen(__builtin_convertvector(load<HalfVu>(x + i), Vu)));
  if (i == n) return;
  std::uint16_t in[kFloats] = {};
  std::memcpy(in, x + i, (n - i) * sizeof *x);
  const Vf last = Half::widen(__builtin_convertvector(load<HalfVu>(in), Vu));
  std::memcpy(out + i, &last, (n - i) * sizeof *out);
}

// False if a value is not finite.
template <class Half>
inline bool narrow_row(const float* x, std::uint16_t* out, std::size_t n) {
  Vu largest{};
  const auto vector = [&](const float* from, std::uint16_t* to) {
    const Vu h = Half::narrow(load<Vf>(from)), magnitude = h & 0x7fffu;
    largest = magnitude > largest ? magnitude : largest;
    store(to, __builtin_convertvector(h, HalfVu));
  };
  std::size_t i = 0;
  for (; i + kFloats <= n; i += kFloats) vector(x + i, out + i);
  if (i < n) {
    float in[kFloats] = {};
    std::uint16_t rounded[kFloats];
    std::memcpy(in, x + i, (n - i) * sizeof *x);
    vector(in, rounded);
    std::memcpy(out + i, rounded, (n - i) * sizeof *out);
  }
  std::uint32_t lanes[kFloats], top = 0;
  store(lanes, largest);
  for (const std::uint32_t lane : lanes) top = std::max(top, lane);
  return top < Half::kInfinity;
}

// By way of float, in pieces that stay in the first-level cache: widening rounds nothing.
constexpr std::size_t kHop = 256;

template <class Half>
inline void widen_row(const std::uint16_t* x, double* out, std::size_t n) {
  float hop[kHop];
  for (std::size_t i = 0; i < n; i += kHop) {
    const std::size_t count = std::min(kHop, n - i);
    widen_row<Half>(x + i, hop, count);
    cast_row(hop, out + i, count);
  }
}

template <class Half>
inline bool narrow_row(const double* x, std::uint16_t* out, std::size_t n) {
  float hop[kHop];
  bool finite = true;
  for (std::size_t i = 0; i < n; i += kHop) {
    const std::size_t count = std::min(kHop, n - i);
    cast_row(x + i, hop, count);
    finite &= narrow_row<Half>(hop, out + i, count);
  }
  return finite;
}

template <class To, class From>
inline bool narrow_row(const From* x, To* out, std::size_t n) {
  bool finite = true;
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = static_cast<To>(x[i]);
    finite &= std::abs(out[i]) <= std::numeric_limits<To>::max();
  }
  return finite;
}

// The address of element i.
inline const char* element(const void* data, DType dtype, std::size_t i) {
  return static_cast<const char*>(data) + i * size_of(dtype);
}

// out[0 .. n) <- the n values at element `first` of data.
template <class T>
inline void widen(const void* data, DType dtype, std::size_t first, T* out, std::size_t n) {
  switch (dtype) {
    case DType::bfloat16:
      return widen_row<BFloat16>(static_cast<const std::uint16_t*>(data) + first, out, n);
    case DType::float16:
      return widen_row<Float16>(static_cast<const std::uint16_t*>(data) + first, out, n);
    case DType::float32:
      return cast_row(static_cast<const float*>(data) + first, out, n);
    case DType::float64:
      return cast_row(static_cast<const double*>(data) + first, out, n);
  }
}

// piece (a row of `stride` values for each row of a) <- columns first .. first + count of a flat factor, with zeros up
// to `padded`; as many columns after them are fetched ahead.
template <class T>
inline void widen_columns(const Factor& a, std::size_t first, std::size_t count, std::size_t padded, T* piece,
                          std::size_t stride) {
  const std::size_t next = std::min(count, a.length - first - count);
  for (std::size_t i = 0; i < a.r; ++i) {
    T* row = piece + i * stride;
    widen(a.data, a.dtype, i * a.length + first, row, count);
    prefetch<0>(element(a.data, a.dtype, i * a.length + first + count), next * size_of(a.dtype));
    std::fill(row + count, row + padded, T{0});
  }
}

// The n values at element `first` of data <- x, rounded to nearest; false if one of them is then not finite.
template <class T>
inline bool narrow(const T* x, void* data, DType dtype, std::size_t first, std::size_t n) {
  switch (dtype) {
    case DType::bfloat16:
      return narrow_row<BFloat16>(x, static_cast<std::uint16_t*>(data) + first, n);
    case DType::float16:
      return narrow_row<Float16>(x, static_cast<std::uint16_t*>(data) + first, n);
    case DType::float32:
      return narrow_row<float>(x, static_cast<float*>(data) + first, n);
    case DType::float64:
      return narrow_row<double>(x, static_cast<double*>(data) + first, n);
  }
  return false;
}

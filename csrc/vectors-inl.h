// Vectors of the instruction set that includes this, by the compiler's vector extension: GCC's and Clang's alike.
// Included inside the namespace and the target region of an isa_*.cpp, after the standard headers.

template <class T, std::size_t kBytes>
struct Vector {
  typedef T Type __attribute__((vector_size(kBytes)));
};

// A whole vector of double or float.
template <class T>
struct Lanes {
  static constexpr std::size_t kCount = kVectorBytes / sizeof(T);
  using Type = typename Vector<T, kVectorBytes>::Type;
};

using Vd = Lanes<double>::Type;
using Vf = Lanes<float>::Type;
using Vu = Lanes<std::uint32_t>::Type;
using HalfVu = Vector<std::uint16_t, kVectorBytes / 2>::Type;
constexpr std::size_t kDoubles = Lanes<double>::kCount, kFloats = Lanes<float>::kCount;

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

constexpr std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Halves are added until one lane is left.
template <std::size_t kBytes>
inline double sum_of(typename Vector<double, kBytes>::Type v) {
  if constexpr (kBytes == sizeof(double)) {
    return v[0];
  } else {
    typename Vector<double, kBytes / 2>::Type half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return sum_of<kBytes / 2>(half[0] + half[1]);
  }
}

inline double sum(Vd v) { return sum_of<kVectorBytes>(v); }

// Fetches the lines of [p, p + bytes) ahead of their use: rows far apart are more than the hardware follows by itself.
template <int kForWriting>
inline void prefetch(const void* p, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  for (std::size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(p) + i, kForWriting, 2);
}

// Bytes that are written whole, and not read soon: whole lines go past the caches.
inline void stream(char* out, const char* from, std::size_t bytes) {
#if defined(__x86_64__)
  if (reinterpret_cast<std::uintptr_t>(out) % 64 == 0 && bytes % 64 == 0) {
    for (std::size_t i = 0; i < bytes; i += sizeof(__m128i))
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), load<__m128i>(from + i));
    return;
  }
#endif
  std::memcpy(out, from, bytes);
}

// What was streamed is seen by other threads once this has returned.
inline void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Memory that starts at a cache line and is kept for the same thread's next task, since fresh pages cost more than the
// work.
template <class T>
class Buffer {
 public:
  T* reserve(std::size_t count) {
    if (count > size_) {
      size_ = 0;
      data_.reset();
      data_.reset(static_cast<T*>(::operator new[](count * sizeof(T), kCacheLine)));
      size_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, kCacheLine); }
  };
  std::unique_ptr<T[], Delete> data_;
  std::size_t size_ = 0;
};

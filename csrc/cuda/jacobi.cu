// One-sided Jacobi SVD of small square matrices, one block per matrix: x^T Q V = W diag(s), so x = (Q V) diag(s) W^T.
// Q reflects the rows of G = x^T to a triangle in the order of their lengths, after which four to nine sweeps of
// rotations are enough. The columns of G and V lie in shared memory; a warp rotates a pair of them.
//
// Compiled by nvcc, or for the host behind host_shim.h.
#ifdef __CUDACC__
#include <cuda_runtime.h>
#define SHARED_MEMORY(name) extern __shared__ double name[]
constexpr int kWarp = 32;
#else
#include "host_shim.h"
#define SHARED_MEMORY(name) double* name = shim::block->shared.get()
constexpr int kWarp = shim::kWarp;
#endif

#include <cfloat>

namespace {

constexpr int kMaxSweeps = 20;
constexpr unsigned kAllLanes = 0xffffffffu;
// Of a matrix: as kernels/batched_svd/gpu.py has them.
enum Status { kConverged = 0, kNotFinite = 1, kNotConverged = 2 };

// Lengths relative to the largest element: of the noise that takes the place of a column that vanished, and what is
// reported as 0, far below rounding and far above the noise.
template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kNoise = 1.0f / (1ll << 40), kZero = kNoise * 64, kEpsilon = FLT_EPSILON, kMax = FLT_MAX;
};
template <>
struct Limits<double> {
  static constexpr double kNoise = 1.0 / (1ll << 40) / (1ll << 40), kZero = kNoise * 64, kEpsilon = DBL_EPSILON,
                          kMax = DBL_MAX;
};

__device__ inline float inverse_root(float x) { return rsqrtf(x); }
__device__ inline double inverse_root(double x) { return 1 / sqrt(x); }

template <typename T>
__device__ T warp_sum(T x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

template <typename T>
__device__ T warp_max(T x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// What the threads of a block share. Columns are odd numbers apart, so that neither they nor rows meet bank conflicts.
template <typename T>
struct Shared {
  T *g, *v, *lengths, *reflector;
  int* order;
  int r, stride;

  __device__ Shared(void* memory, int r_) : r(r_), stride(r_ | 1) {
    g = static_cast<T*>(memory);
    v = g + r * stride;
    lengths = v + r * stride;
    reflector = lengths + r;
    order = reinterpret_cast<int*>(reflector + r);
  }
  static std::size_t bytes(int r) { return (2 * r * (r | 1) + 2 * r) * sizeof(T) + r * sizeof(int); }
};

// order[k] <- which of the lengths is the k-th longest. To be followed by a barrier.
template <typename T>
__device__ void sort_lengths(const Shared<T>& m) {
  for (int i = threadIdx.x; i < m.r; i += blockDim.x) {
    int place = 0;
    for (int j = 0; j < m.r; ++j) place += m.lengths[j] > m.lengths[i] || (m.lengths[j] == m.lengths[i] && j < i);
    m.order[place] = i;
  }
}

// G <- G Q, V <- Q by Householder reflections of the columns, row by row in the order of their lengths.
template <typename T>
__device__ void make_triangular(const Shared<T>& m) {
  for (int i = threadIdx.x; i < m.r; i += blockDim.x) {
    T square = 0;
    for (int c = 0; c < m.r; ++c) square += m.g[c * m.stride + i] * m.g[c * m.stride + i];
    m.lengths[i] = square;
  }
  __syncthreads();
  sort_lengths(m);
  for (int k = 0; k + 1 < m.r; ++k) {
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const T* row = m.g + m.order[k];
      T square = 0;
      for (int c = k + threadIdx.x; c < m.r; c += kWarp) square += row[c * m.stride] * row[c * m.stride];
      const T length = sqrt(warp_sum(square)), first = row[k * m.stride];
      // What is shorter than the noise stays as it is: its square may have underflowed.
      const bool reflects = length > Limits<T>::kNoise;
      const T factor = reflects ? inverse_root(length * (length + fabs(first))) : 0;
      for (int c = k + threadIdx.x; c < m.r; c += kWarp) {
        m.reflector[c] = factor * (row[c * m.stride] + (c > k ? 0 : first < 0 ? -length : length));
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * m.r; i += blockDim.x) {
      T* row = i < m.r ? m.g + i : m.v + i - m.r;
      T product = 0;
      for (int c = k; c < m.r; ++c) product += m.reflector[c] * row[c * m.stride];
      for (int c = k; c < m.r; ++c) row[c * m.stride] -= m.reflector[c] * product;
    }
  }
  __syncthreads();
}

// Replaces columns that vanished by noise, which the rotations make orthogonal to all others: null vectors come out
// like any others. To be followed by a barrier.
template <typename T>
__device__ bool revive(const Shared<T>& m, unsigned sweep) {
  bool revived = false;
  for (int c = threadIdx.x / kWarp; c < m.r; c += blockDim.x / kWarp) {
    T* column = m.g + c * m.stride;
    T square = 0;
    for (int i = threadIdx.x % kWarp; i < m.r; i += kWarp) square += column[i] * column[i];
    if (!(sqrt(warp_sum(square)) < Limits<T>::kNoise / 1024)) continue;
    revived = true;
    for (int i = threadIdx.x % kWarp; i < m.r; i += kWarp) {
      unsigned h = (sweep * m.r + c) * m.r + i;
      h = (h ^ (h >> 16)) * 0x7feb352du;
      h = (h ^ (h >> 15)) * 0x846ca68bu;
      h = (h ^ (h >> 16)) >> 8;
      column[i] = (static_cast<T>(h) / (1 << 23) - 1) * Limits<T>::kNoise * inverse_root(static_cast<T>(m.r));
    }
  }
  return revived;
}

// Makes two columns of G orthogonal, each lane holding kEach elements of either, and rotates those of V alike.
template <typename T, int kEach>
__device__ bool rotate(const Shared<T>& m, int first, int second, T tolerance) {
  const int lane = threadIdx.x % kWarp;
  T *x = m.g + first * m.stride, *y = m.g + second * m.stride;
  T gx[kEach], gy[kEach], a = 0, b = 0, d = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = lane + e * kWarp;
    gx[e] = i < m.r ? x[i] : 0;
    gy[e] = i < m.r ? y[i] : 0;
    a += gx[e] * gx[e];
    b += gy[e] * gy[e];
    d += gx[e] * gy[e];
  }
  a = warp_sum(a);
  b = warp_sum(b);
  d = warp_sum(d);
  if (!(fabs(d) > tolerance * sqrt(a) * sqrt(b))) return false;
  const T cotangent = (b - a) / (2 * d);  // of twice the angle
  const T size = fabs(cotangent);
  // Beyond, the square would not change 1 + size, and may overflow.
  const T hypotenuse = size > 1 << 20 ? size : sqrt(1 + size * size);
  const T t = (cotangent < 0 ? -1 : 1) / (size + hypotenuse);
  // An approximation: if it makes G's and V's columns longer, then alike.
  const T cosine = inverse_root(1 + t * t), sine = cosine * t;
  T *vx = m.v + first * m.stride, *vy = m.v + second * m.stride;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = lane + e * kWarp;
    if (i >= m.r) break;
    x[i] = cosine * gx[e] - sine * gy[e];
    y[i] = sine * gx[e] + cosine * gy[e];
    const T p = vx[i], q = vy[i];
    vx[i] = cosine * p - sine * q;
    vy[i] = sine * p + cosine * q;
  }
  return true;
}

template <typename T, int kEach>
__global__ void __launch_bounds__(kEach > 2 ? 512 : 256, kEach > 2 ? 1 : 4)
    jacobi_svd(const T* __restrict__ x, T* __restrict__ u, T* __restrict__ s, T* __restrict__ vh,
               int* __restrict__ status, int r) {
  SHARED_MEMORY(memory);
  const Shared<T> m(memory, r);
  const std::size_t offset = static_cast<std::size_t>(blockIdx.x) * r * r;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;

  T largest = 0;
  bool infinite = false;
  for (int e = threadIdx.x; e < r * r; e += blockDim.x) {
    const T size = fabs(x[offset + e]);
    infinite |= !(size <= Limits<T>::kMax);
    largest = size > largest ? size : largest;
  }
  infinite = __syncthreads_or(infinite);
  // A warp's largest lies where it lays its columns later: there are no more warps than elements of G and V.
  largest = warp_max(largest);
  if (lane == 0) m.g[warp] = largest;
  __syncthreads();
  for (int w = 0; w < warps; ++w) largest = m.g[w] > largest ? m.g[w] : largest;
  __syncthreads();
  // By a power of two: nothing is rounded, and squares neither overflow nor underflow. In two factors, since one may
  // be out of range.
  const int half = largest > 0 && !infinite ? ilogb(largest) / 2 : 0;
  const T up = scalbn(static_cast<T>(1), -half), down = scalbn(static_cast<T>(1), half);
  for (int e = threadIdx.x; e < r * r; e += blockDim.x) {
    const int c = e / r, i = e % r;
    m.g[c * m.stride + i] = infinite ? 0 : x[offset + e] * up * up;
    m.v[c * m.stride + i] = c == i;
  }
  __syncthreads();
  make_triangular(m);

  const T tolerance = Limits<T>::kEpsilon * sqrt(static_cast<T>(r));
  const int players = r + r % 2;  // one more than there are if that is odd: its partner rests
  bool busy = !infinite;
  for (int sweep = 0; busy && sweep < kMaxSweeps; ++sweep) {
    bool rotated = revive(m, sweep);
    __syncthreads();
    for (int step = 0; step < players - 1; ++step) {
      for (int pair = warp; pair < players / 2; pair += warps) {
        // The last one stays where it is, and the others go round.
        const int first = (step + pair) % (players - 1);
        const int second = pair == 0 ? players - 1 : (step + players - 1 - pair) % (players - 1);
        if (first < r && second < r) rotated |= rotate<T, kEach>(m, first, second, tolerance);
      }
      __syncthreads();
    }
    busy = __syncthreads_or(rotated);
  }

  for (int c = warp; c < r; c += warps) {
    T g_square = 0, v_square = 0;
    for (int i = lane; i < r; i += kWarp) {
      g_square += m.g[c * m.stride + i] * m.g[c * m.stride + i];
      v_square += m.v[c * m.stride + i] * m.v[c * m.stride + i];
    }
    // Rounding of the rotations made both longer alike.
    const T length = sqrt(warp_sum(g_square)), drift = sqrt(warp_sum(v_square));
    for (int i = lane; i < r; i += kWarp) {
      m.g[c * m.stride + i] /= length;
      m.v[c * m.stride + i] /= drift;
    }
    if (lane == 0) m.lengths[c] = length > Limits<T>::kZero ? length / drift : 0;
  }
  __syncthreads();
  sort_lengths(m);
  __syncthreads();
  for (int e = threadIdx.x; e < r * r; e += blockDim.x) {
    const int row = e / r, column = e % r;
    u[offset + e] = m.v[m.order[column] * m.stride + row];
    vh[offset + e] = m.g[m.order[row] * m.stride + column];
  }
  for (int k = threadIdx.x; k < r; k += blockDim.x) {
    s[static_cast<std::size_t>(blockIdx.x) * r + k] = infinite ? NAN : m.lengths[m.order[k]] * down * down;
  }
  if (threadIdx.x == 0) {
    const bool overflows = !(m.lengths[m.order[0]] * down * down <= Limits<T>::kMax);
    status[blockIdx.x] = infinite ? kNotFinite : busy || overflows ? kNotConverged : kConverged;
  }
}

template <typename T, int kEach>
int launch(const T* x, T* u, T* s, T* vh, int* status, int count, int r, cudaStream_t stream) {
  const int pairs = (r + 1) / 2, most = kEach > 2 ? 16 : 8, warps = pairs < most ? pairs : most;
  const std::size_t bytes = Shared<T>::bytes(r);
#ifdef __CUDACC__
  const cudaError_t error =
      cudaFuncSetAttribute(jacobi_svd<T, kEach>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return cudaGetLastError();  // the same, and forgotten: it is the caller's now
  jacobi_svd<T, kEach><<<count, warps * kWarp, bytes, stream>>>(x, u, s, vh, status, r);
  return cudaGetLastError();
#else
  (void)stream;
  shim::launch(count, warps * kWarp, bytes, [=] { jacobi_svd<T, kEach>(x, u, s, vh, status, r); });
  return 0;
#endif
}

template <typename T>
int svd(const T* x, T* u, T* s, T* vh, int* status, int count, int r, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (count <= 0 || r <= 0) return 0;
  if (r <= kWarp) return launch<T, 1>(x, u, s, vh, status, count, r, queue);
  if (r <= 2 * kWarp) return launch<T, 2>(x, u, s, vh, status, count, r, queue);
  if (r <= 4 * kWarp) return launch<T, 4>(x, u, s, vh, status, count, r, queue);
  return -1;
}

}  // namespace

// x, u and vh (count, r, r), s (count, r), status (count,), all on the device; r up to 128 as far as shared memory
// allows. Returns 0, a cudaError_t, or -1 if r is too large.
extern "C" int spectral_fast_svd_float(const float* x, float* u, float* s, float* vh, int* status, int count, int r,
                                       void* stream) {
  return svd(x, u, s, vh, status, count, r, stream);
}

extern "C" int spectral_fast_svd_double(const double* x, double* u, double* s, double* vh, int* status, int count,
                                        int r, void* stream) {
  return svd(x, u, s, vh, status, count, r, stream);
}

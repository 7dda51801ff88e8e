// The native kernels: raw pointers and sizes in, no Python, no Torch, no printing, no abort.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace spectral_fast {

enum class DType : std::int64_t { bfloat16 = 0, float16 = 1, float32 = 2, float64 = 3 };

// In bytes.
constexpr std::size_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// A factor of a low-rank update: B is tall, its `length` rows of `r` values; A is flat, `r` rows of `length` values.
// Row-major and without gaps either way.
enum class Shape : std::int64_t { tall = 0, flat = 1 };

struct Factor {
  const void* data;
  DType dtype;
  Shape shape;
  std::size_t length, r;
};

// Of a single matrix, b_not_finite stands for itself.
enum class SvdStatus : std::int32_t { converged = 0, not_converged = 1, b_not_finite = 2, a_not_finite = 3 };

// One module's B A = U diag(s) V^T with U = B t_b and V = A^T t_a. Outputs: s (r, descending, not negative), t_b and
// t_a (r x r), row-major; where those are null, s alone.
struct SvdTask {
  Factor b, a;
  double *s, *t_b, *t_a;
  // An estimate of max(|U^T U - I|_F, |V^T V - I|_F), infinite where a step failed; of s alone, a bound on its error
  // over the largest.
  double loss;
  // The largest root of a sum of squares d_i^2 t_ik^2, d_i the length of B's column or A's row i: how large the terms
  // of U and V may be, and so the rounding of their sums.
  double amplification;
  SvdStatus status;
};

// With T = transform x diag(scale), r x rank in float64: out = basis x T for a tall basis (length x r), T^T x basis for
// a flat one. `out` may be the basis itself where its type and shape are the same.
struct RecomposeTask {
  Factor basis;
  const double *transform, *scale;
  std::size_t rank;
  void* out;
  DType out_dtype;
  bool wide;    // sums in float64 rather than float32
  bool finite;  // set: every value of out is
};

// out[t] = sum over the tokens starts[t] <= n < starts[t + 1] of p_n * q_n, elementwise; p, q are tokens x r, of any
// type but float64.
struct SensitivityTask {
  const void *p, *q;
  DType dtype;
  std::size_t r;
  const std::int64_t* starts;
  float* out;
};

// How many small matrices one thread works on at once.
constexpr std::size_t kTogether = 2;

// The bodies, built once per instruction set.
struct Kernels {
  const char* isa;
  bool (*supported)();
  void (*lowrank_svd)(SvdTask&);
  void (*recompose)(RecomposeTask&);
  void (*segment_products)(const SensitivityTask&, std::size_t segment);
  // Of at most kTogether matrices.
  void (*jacobi_svd)(const double* m, double* wt, double* s, double* vt, SvdStatus* status, std::size_t count,
                     std::size_t r);
};

extern const Kernels* const kImplementations[];  // best first
extern const std::size_t kImplementationCount;

// The best of these that this processor has, or the one that is forced by name; throws std::runtime_error if that one
// is unknown, or not supported here.
const Kernels& choose(const Kernels* const* implementations, std::size_t count, const char* forced);

// The choice of this process, made once; the environment's SPECTRAL_FAST_ISA forces.
const Kernels& kernels();

// Whole adapters over at most `threads` threads; the result has the same bits for any number of them.
void lowrank_svd(std::vector<SvdTask>& tasks, int threads);
void recompose(std::vector<RecomposeTask>& tasks, int threads);
void segment_products(const SensitivityTask& task, std::size_t segments, int threads);

// M = W diag(s) V^T of each of `count` row-major r x r matrices m: s (r, descending, not negative), left and right
// vectors in the rows of wt and vt. A row of wt whose s is zero is zero; V is orthogonal in any case. A matrix with a
// NaN or an infinity leaves its outputs untouched.
void jacobi_svd(const double* m, double* wt, double* s, double* vt, SvdStatus* status, std::size_t count, std::size_t r,
                int threads);

}  // namespace spectral_fast

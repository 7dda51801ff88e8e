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
// t_a (r x r), row-major.
struct SvdTask {
  Factor b, a;
  double *s, *t_b, *t_a;
  // An estimate of max(|U^T U - I|_F, |V^T V - I|_F), infinite where a step failed.
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

// Of every row of logits (tokens x vocabulary, any type but float64): logsumexp, the logit at its label, and the `top`
// largest in the order of their ids, of equal ones those with the lowest. A label may be kElsewhere (gold is then
// -infinity), or kIgnored: the row is not read, and all outputs are 0.
struct TopLogitsTask {
  const void* logits;
  DType dtype;
  std::size_t vocabulary, top;
  const std::int64_t* labels;
  float *logsumexp, *gold, *values;
  std::int64_t* ids;
};
constexpr std::int64_t kIgnored = -100, kElsewhere = -1;

// z = sum over tokens t of s_h(t) * s_e(t), a circular convolution of length m. CountSketches: s_h has
// sign_h[i] hidden[t][i] in bucket bucket_h[i], s_e has sign_e[j] e[j] in bucket bucket_e[j], for e = softmax - onehot
// at the largest logits of the row, as TopLogitsTask leaves them, and at its label. Tokens of label kIgnored are not
// read. The sum of each run of kTokensOfSketch tokens is left in a row of sums.
struct TensorSketchTask {
  const void* hidden;
  DType dtype;
  std::size_t tokens, features, top, m;
  const float *logsumexp, *gold, *values;
  const std::int64_t *ids, *labels;
  const std::int32_t *bucket_h, *bucket_e;
  const float *sign_h, *sign_e;
  float* sums;
};
constexpr std::size_t kTokensOfSketch = 32;

// U^T = basis (k x m, row-major) has as many orthonormal rows as `squares` (k, descending) has positive values, and
// zeros below; z is m values. out and out_squares are the same for U diag(squares) U^T + z z^T: the k largest
// eigenvalues less the next one.
struct FrequentDirectionsTask {
  const double *basis, *squares, *z;
  std::size_t k, m;
  double *out, *out_squares;
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
  void (*top_logits)(const TopLogitsTask&, std::size_t row);
  void (*tensor_sketch)(const TensorSketchTask&, std::size_t run);
  // Of at most kTogether matrices.
  void (*jacobi_svd)(const double* m, double* wt, double* s, double* vt, SvdStatus* status, std::size_t count,
                     std::size_t r);
  // Returns the eigenvalue that was taken off, or NaN, with outputs untouched, if z is not finite.
  double (*frequent_directions)(const FrequentDirectionsTask&);
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
void top_logits(const TopLogitsTask& task, std::size_t rows, int threads);
// The sums of the task are its own business: z (m) is their total.
void tensor_sketch(TensorSketchTask task, float* z, int threads);

// M = W diag(s) V^T of each of `count` row-major r x r matrices m: s (r, descending, not negative), left and right
// vectors in the rows of wt and vt. A row of wt whose s is zero is zero; V is orthogonal in any case. A matrix with a
// NaN or an infinity leaves its outputs untouched.
void jacobi_svd(const double* m, double* wt, double* s, double* vt, SvdStatus* status, std::size_t count, std::size_t r,
                int threads);

}  // namespace spectral_fast

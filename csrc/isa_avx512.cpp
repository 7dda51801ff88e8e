#if defined(__x86_64__)
#include "processor.h"
#include "region.h"

SPECTRAL_FAST_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace spectral_fast::avx512 {
namespace {
constexpr std::size_t kVectorBytes = 64;
#include "kernels-inl.h"
}  // namespace
}  // namespace spectral_fast::avx512
SPECTRAL_FAST_END_TARGET

// Outside of the region: a processor without these instructions asks, too.
namespace spectral_fast::avx512 {
extern const Kernels kKernels{
    "avx512",
    [] { return processor_has(bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL, kZmm); },
    lowrank_svd,
    recompose,
    segment_products_of,
    top_logits_of,
    tensor_sketch_of,
    jacobi_svd,
    frequent_directions,
    spline_of};
}  // namespace spectral_fast::avx512
#endif

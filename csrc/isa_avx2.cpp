#if defined(__x86_64__)
#include "processor.h"
#include "region.h"

SPECTRAL_FAST_BEGIN_TARGET("avx2,fma")
namespace spectral_fast::avx2 {
namespace {
constexpr std::size_t kVectorBytes = 32;
#include "kernels-inl.h"
}  // namespace
}  // namespace spectral_fast::avx2
SPECTRAL_FAST_END_TARGET

// Outside of the region: a processor without these instructions asks, too.
namespace spectral_fast::avx2 {
extern const Kernels kKernels{"avx2",
                              [] { return processor_has(bit_AVX2, kYmm); },
                              lowrank_svd,
                              recompose,
                              segment_products_of,
                              top_logits_of,
                              tensor_sketch_of,
                              jacobi_svd,
                              frequent_directions,
                              spline_of};
}  // namespace spectral_fast::avx2
#endif

// What every processor of the architecture has: 16-byte vectors, which the compiler maps to SSE2 or NEON, or takes
// apart where there are none. Users know it as "scalar", the usual name of the last resort, SSE2 or not.
#include "region.h"

namespace spectral_fast::baseline {
namespace {
constexpr std::size_t kVectorBytes = 16;
#include "kernels-inl.h"
}  // namespace
extern const Kernels kKernels{
#if defined(__aarch64__)
    "neon",
#else
    "scalar",
#endif
    [] { return true; },
    lowrank_svd,
    recompose,
    segment_products_of,
    top_logits_of,
    tensor_sketch_of,
    jacobi_svd,
    frequent_directions,
    spline_of};
}  // namespace spectral_fast::baseline

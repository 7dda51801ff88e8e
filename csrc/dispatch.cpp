#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace spectral_fast {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#endif
namespace baseline {
extern const Kernels kKernels;
}

const Kernels* const kImplementations[] = {
#if defined(__x86_64__)
    &avx512::kKernels, &avx2::kKernels,
#endif
    &baseline::kKernels};
const std::size_t kImplementationCount = sizeof kImplementations / sizeof *kImplementations;

const Kernels& choose(const Kernels* const* implementations, std::size_t count, const char* forced) {
  const bool any = forced == nullptr || *forced == '\0';
  std::string known;
  for (std::size_t i = 0; i < count; ++i) {
    const Kernels& candidate = *implementations[i];
    const bool supported = candidate.supported();
    if (any && supported) return candidate;
    if (!any && candidate.isa == std::string(forced)) {
      if (supported) return candidate;
      throw std::runtime_error("SPECTRAL_FAST_ISA=" + std::string(forced) + ", but this processor does not have " +
                               forced + "; unset it, or name another");
    }
    known += (known.empty() ? "" : ", ") + std::string(candidate.isa);
  }
  throw std::runtime_error("SPECTRAL_FAST_ISA=" + std::string(forced) +
                           " is no instruction set of this build; known: " + known);
}

const Kernels& kernels() {
  // An exception leaves it unset: every call says so.
  static const Kernels& chosen = choose(kImplementations, kImplementationCount, std::getenv("SPECTRAL_FAST_ISA"));
  return chosen;
}

}  // namespace spectral_fast

// What the processor has, and the operating system keeps for it. By CPUID rather than __builtin_cpu_supports: that one
// asks the compiler's runtime library, and zig's, which links the published wheels, answers no to everything.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

namespace spectral_fast {

// Registers that are saved when threads switch, as bits of XCR0.
constexpr unsigned kYmm = 0x06, kZmm = 0xe6;

// FMA, and all of these bits of CPUID's leaf 7 in EBX.
inline bool processor_has(unsigned features, unsigned registers) {
  constexpr unsigned kBase = bit_FMA | bit_OSXSAVE;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kBase) != kBase) return false;
  asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & registers) != registers) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & features) == features;
}

}  // namespace spectral_fast
#endif

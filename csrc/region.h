// Everything that kernel bodies need from outside: included before a target region begins, so that no function of the
// standard library is compiled for an instruction set that the processor may lack.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <numeric>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define SPECTRAL_FAST_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPECTRAL_FAST_BEGIN_TARGET(features) \
  SPECTRAL_FAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SPECTRAL_FAST_END_TARGET SPECTRAL_FAST_PRAGMA(clang attribute pop)
#else
#define SPECTRAL_FAST_BEGIN_TARGET(features) \
  SPECTRAL_FAST_PRAGMA(GCC push_options) SPECTRAL_FAST_PRAGMA(GCC target(features))
#define SPECTRAL_FAST_END_TARGET SPECTRAL_FAST_PRAGMA(GCC pop_options)
#endif

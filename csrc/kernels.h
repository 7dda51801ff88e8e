// The native kernels: raw pointers and sizes in, no Python, no Torch, no printing, no abort.
#pragma once

#include <cstdint>

namespace spectral_fast {

enum class SvdStatus : std::int32_t { converged = 0, not_converged = 1, not_finite = 2 };

// Singular values s (r, descending, not negative) and left singular vectors (row k of wt) of each of `count`
// row-major r x r matrices m; the right ones follow from m's transpose. A row of wt whose s is zero is zero.
// One matrix per thread, so the result has the same bits for any number of threads. status[i] is the outcome
// for matrix i as an SvdStatus; a matrix with a NaN or an infinity leaves its outputs untouched.
// Drmac and Veselic, "New fast and accurate Jacobi SVD algorithm I", SIAM J. Matrix Anal. Appl. 29 (2008).
void jacobi_svd(const double* m, double* wt, double* s, std::int32_t* status, std::int64_t count, std::int64_t r,
                int threads);

}  // namespace spectral_fast

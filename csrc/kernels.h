// The native kernels: raw pointers and sizes in, no Python, no Torch, no printing, no abort.
#pragma once

#include <cstdint>

namespace spectral_fast {

enum class SvdStatus : std::int32_t { converged = 0, not_converged = 1, not_finite = 2 };

// M = Wt^T diag(s) Zt for each of `count` row-major r x r matrices: row k of wt and of zt is the k-th left
// and right singular vector, s is descending and not negative, and wt and zt are orthogonal whatever the rank
// of M. One-sided Jacobi on a pivoted QR's triangle (Drmac and Veselic, SIAM J. Matrix Anal. Appl. 29, 2008):
// column-wise accurate, and far fewer sweeps than plain Jacobi.
// One matrix per thread, so the result has the same bits for any number of threads.
// status[i] tells the outcome for matrix i; a matrix with a NaN or an infinity leaves its outputs untouched.
void jacobi_svd(const double* m, double* wt, double* s, double* zt, std::int32_t* status, std::int64_t count,
                std::int64_t r, int threads);

}  // namespace spectral_fast

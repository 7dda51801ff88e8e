"""SVDs M = U diag(s) Vᵀ of many small square matrices, r up to 512: the cores of low-rank updates.

One-sided Jacobi: rotations from the right make the columns of M orthogonal, M J = U diag(s). One matrix stays in the
cache of one core, or on chip, until it is done.

Source: Drmač and Veselić, "New fast and accurate Jacobi SVD algorithm", SIAM J. Matrix Anal. Appl. 29 (2008).
"""

from spectral_fast.kernels.batched_svd.op import batched_svd

__all__ = ["batched_svd"]

"""A vector folded into a weighted subspace of at most k directions: one step of Frequent Directions.

U diag(s²) Uᵀ + z zᵀ has k + 1 eigenvalues at most; the least of them, if there are so many, is taken off all. With z =
U p + ρ r they are those of diag(s², 0) + v vᵀ, v = (p, ρ), in the basis [U | r]: the roots of 1 + Σ v_j² / (d_j − x) =
0, one in each gap of the d. No SVD of an m × (k + 1) matrix is taken.

Source: Liberty, "Simple and deterministic matrix sketching", KDD 2013; Bunch, Nielsen and Sorensen, "Rank-one
modification of the symmetric eigenproblem", Numer. Math. 31 (1978); Gu and Eisenstat, SIAM J. Matrix Anal. Appl. 15
(1994).
"""

from spectral_fast.kernels.frequent_directions.op import frequent_directions

__all__ = ["frequent_directions"]

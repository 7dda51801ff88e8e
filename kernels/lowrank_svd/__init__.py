"""Compact SVD of low-rank updates, ΔW = B A = U diag(s) Vᵀ, without ever forming ΔW.

With B (m, r), A (r, n) and r far below m and n, by QR (the definition, ``reference.py``):

    B = Q_B R_B,   Aᵀ = Q_A R_A,   R_B R_Aᵀ = W diag(s) Zᵀ (r × r),   U = Q_B W,   V = Q_A Z

and, with the triangles from Cholesky factors of Gram matrices (``cpu.py``):

    Bᵀ B = R_Bᵀ R_B,   A Aᵀ = R_Aᵀ R_A,   U = B T_B with T_B = R_B⁻¹ W,   V = Aᵀ T_A with T_A = R_A⁻¹ Z

which reads the factors once, forms no tall Q, and gives U and V as the factors themselves times r × r
transforms. An edit of s alone then needs neither U nor V: B' = B (T_B diag(√s')), A' = (diag(√s') T_Aᵀ) A.

Sources: the QR form is that of Tian et al., "Spectral Surgery", arXiv:2603.03995, section 3; the condition
under which Gram matrices suffice is Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, "Roundoff error analysis of
the CholeskyQR2 algorithm", ETNA 44 (2015); the r × r SVD is Drmač and Veselić, "New fast and accurate Jacobi
SVD algorithm", SIAM J. Matrix Anal. Appl. 29 (2008).
"""

from spectral_fast.kernels.lowrank_svd.op import lowrank_svd, singular_values
from spectral_fast.kernels.lowrank_svd.reference import Factored

__all__ = ["Factored", "lowrank_svd", "singular_values"]

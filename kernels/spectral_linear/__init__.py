"""LoRA in spectral form, with the gradient of the singular values for free.

A LoRA layer adds s·B A x to its base layer's output y₀. Written through the compact SVD B A = U diag(σ) Vᵀ,

    p = x V                            (N, r)   the one product with the input
    y = y₀ + s (p ⊙ σ) Uᵀ              (N, m)

and its backward pass, for upstream gradient dy = ∂L/∂y,

    q  = dy U                          (N, r)   needed for ∂L/∂x in any case
    dx = s (q ⊙ σ) Vᵀ                  (N, n)
    g  = ∂L/∂σ = s Σ_n q_n ⊙ p_n       (r,)     so this costs an elementwise product and a sum

Only p (N × r) is kept for the backward pass, never x (N × n). The sensitivity g is that of Tian, Chen, Han, Liao,
"Spectral Surgery", arXiv:2603.03995, there computed by hooks that cache x and form both projections again.
"""

from spectral_fast.kernels.spectral_linear.op import spectral_linear
from spectral_fast.kernels.spectral_linear.reference import spectral_linear_reference

__all__ = ["spectral_linear", "spectral_linear_reference"]

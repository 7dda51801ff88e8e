"""The autograd function: two products forward, two backward, and g from what they leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_fast.kernels.sensitivity import segment_products


def spectral_linear(x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> Tensor:
    """Add a LoRA branch in spectral form to a base layer's output: y + scaling · ((x V) ⊙ s) Uᵀ.

    Differentiable in x, y and s; u and vh are constants. The gradient of s is the sensitivity
    g_k = scaling · Σ_n ⟨∂L/∂y_n, u_k⟩⟨x_n, v_k⟩, summed over all tokens in float32 (float64 for float64 inputs).

    Args:
        x: input of the layer, (..., n), the model's dtype.
        y: output of the base layer, (..., m), same leading shape.
        u: left singular vectors, (m, r), dtype of x.
        s: singular values, (r,), float32 or float64.
        vh: right singular vectors as rows, (r, n), dtype of x.
        scaling: LoRA scale, alpha/r or alpha/sqrt(r).

    Returns:
        (..., m) in the dtype of y.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    m, r = u.shape
    n = vh.shape[1]
    if x.shape[-1] != n or y.shape[-1] != m or s.shape != (r,) or vh.shape[0] != r or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"spectral_linear wants x (..., n), y (..., m), u (m, r), s (r,), vh (r, n); got x {tuple(x.shape)}, "
            f"y {tuple(y.shape)}, u {tuple(u.shape)}, s {tuple(s.shape)}, vh {tuple(vh.shape)}"
        )
    out: Tensor = _SpectralLinear.apply(x, y, u, s, vh, scaling)  # type: ignore[no-untyped-call]
    return out


class _SpectralLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> Tensor:
        p = x.reshape(-1, vh.shape[1]) @ vh.mT
        ctx.save_for_backward(p, u, s, vh)
        ctx.scaling = scaling
        weighted = p * (scaling * s).to(p.dtype)
        if y.dtype == p.dtype:
            return torch.addmm(y.reshape(-1, u.shape[0]), weighted, u.mT).view(y.shape)
        return y + (weighted @ u.mT).view(y.shape).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, u, s, vh = ctx.saved_tensors
        scaling: float = ctx.scaling
        q = dy.reshape(-1, u.shape[0]).to(u.dtype) @ u
        [g] = scaling * segment_products(p, q)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ((q * (scaling * s).to(q.dtype)) @ vh).view(*dy.shape[:-1], vh.shape[1])
        return dx, dy, None, g.to(s.dtype), None, None

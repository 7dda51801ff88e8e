"""The definition of the spectral LoRA branch, and its two directions written out."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_fast.kernels.sensitivity import segment_products


def spectral_linear_reference(x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> Tensor:
    """The equation y + scaling · ((x V) ⊙ s) Uᵀ, left to autograd; arguments as for `spectral_linear`."""
    return y + scaling * ((x @ vh.mT) * s.to(x.dtype)) @ u.mT


def forward(
    x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, p) by two products, which torch's BLAS forms as fast as the device can."""
    p = x @ vh.mT
    weighted = p * _of_tokens(s, starts, scaling, p.dtype)
    if y.dtype == p.dtype:
        return torch.addmm(y, weighted, u.mT), p
    return (y + (weighted @ u.mT).to(y.dtype)).contiguous(), p


def backward(
    dy: Tensor, p: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, starts: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """(dx, g); dx has no rows where it is not wanted."""
    q = dy.to(u.dtype) @ u
    g = scaling * segment_products(p, q, starts)
    dx = (q * _of_tokens(s, starts, scaling, q.dtype)) @ vh if wanted else q.new_empty(0, vh.shape[1])
    return dx, g.view(s.shape).to(s.dtype)


def _of_tokens(s: Tensor, starts: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """The scaled singular values of each token's segment: (tokens, r), or (r,) where there is one."""
    scaled = (scaling * s).to(dtype)
    return scaled if starts is None else scaled.repeat_interleave(starts.diff().to(s.device), 0)

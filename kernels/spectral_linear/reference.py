"""The definition of the spectral LoRA branch, left to PyTorch's own autograd."""

from __future__ import annotations

from torch import Tensor


def spectral_linear_reference(x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> Tensor:
    """The equation y + scaling · ((x V) ⊙ s) Uᵀ; arguments as for `spectral_linear`."""
    return y + scaling * ((x @ vh.mT) * s.to(x.dtype)) @ u.mT

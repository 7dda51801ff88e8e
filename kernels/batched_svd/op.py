"""The public function, its backends, and the registered op between them."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_fast.backends import Backend, define, pick, register
from spectral_fast.kernels import gpu


def batched_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decompositions x = u diag(s) vh of a batch of square matrices.

    Args:
        x: (batch, r, r), float32 or float64, finite.

    Returns:
        u (batch, r, r), s (batch, r), descending and not negative, and vh (batch, r, r), in the dtype of x. u and vh
        are orthogonal; the signs of pairs of singular vectors are arbitrary.

    Raises:
        ValueError: x is no batch of square matrices, or holds a NaN or an infinity.
        TypeError: x has another dtype.
        RuntimeError: no backend takes x.

    Cost: about 50 r³ flops a matrix.
    """
    u, s, vh = _op(x)
    return u, s, vh


def _batched_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim != 3 or x.shape[1] != x.shape[2]:
        raise ValueError(f"x must be square matrices (batch, r, r), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    u, s, vh = pick("batched_svd", x).call(x)
    return u, s, vh


def reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""
    if x.numel() and not torch.stack(torch.aminmax(x)).isfinite().all():
        i = int((~x.isfinite().all(-1).all(-1)).nonzero()[0])
        raise ValueError(f"matrix {i} of x holds a NaN or an infinity")
    u, s, vh = torch.linalg.svd(x)
    return u, s, vh


def _gpu_refuses(x: Tensor | None = None) -> str | None:
    reason = gpu.refuses(() if x is None else (x,))
    if reason is None and x is not None and x.shape[-1] > 512:
        reason = f"r is {x.shape[-1]}, more than 512"
    elif reason is None and x is not None and x.dtype == torch.float64:
        architecture = gpu.architecture(x.device)
        if not gpu.ARCHITECTURES[architecture].float64:
            reason = f"float64 is slow on {architecture}"
    return reason


def _gpu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from spectral_fast.kernels.batched_svd.gpu import batched_svd

    return batched_svd(x)


register("batched_svd", Backend("gpu", _gpu_refuses, _gpu), Backend("reference", lambda *_: None, reference))

_op = define(
    "batched_svd",
    "(Tensor x) -> (Tensor u, Tensor s, Tensor vh)",
    _batched_svd,
    lambda x: (torch.empty_like(x), x.new_empty(x.shape[:2]), torch.empty_like(x)),
)

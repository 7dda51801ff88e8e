"""The public function, its backends, and the registered op between them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectral_fast.backends import Backend, define, pick, register
from spectral_fast.kernels import gpu, native

NOT_FINITE = 2  # of SvdStatus in csrc/kernels.h


def batched_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decompositions x = u diag(s) vh of a batch of square matrices; x is detached.

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
    uh, s, vh = _op(x.detach())
    return uh.mT, s, vh


def _batched_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uᵀ, s and Vᵀ: the rows of both are singular vectors."""
    if x.ndim != 3 or x.shape[1] != x.shape[2]:
        raise ValueError(f"x must be square matrices (batch, r, r), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    uh, s, vh = pick("batched_svd", x).call(x)
    return uh, s, vh


def reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""
    if x.numel() and not torch.stack(torch.aminmax(x)).isfinite().all():
        raise _not_finite(~x.isfinite().all(-1).all(-1))
    u, s, vh = torch.linalg.svd(x)
    return u.mT.contiguous(), s, vh.contiguous()


def _not_finite(bad: Tensor) -> ValueError:
    return ValueError(f"matrix {int(bad.nonzero()[0])} of x holds a NaN or an infinity")


def _cpu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from spectral_fast import _C

    m = native.readable(x.detach().double())
    # NumPy asks for large pages, where torch does not: the faults of small ones would cost a quarter of the time.
    uh, s, vh = (torch.from_numpy(np.empty(shape)) for shape in (m.shape, m.shape[:2], m.shape))
    status = torch.empty(len(m), dtype=torch.int32)
    _C.jacobi_svd(m.numpy(), uh.numpy(), s.numpy(), vh.numpy(), status.numpy(), torch.get_num_threads())
    if (status == NOT_FINITE).any():
        raise _not_finite(status == NOT_FINITE)
    # Jacobi leaves no left vectors where s is zero.
    redo = (status != 0) | (s == 0).any(-1)
    if redo.any():
        uh[redo], s[redo], vh[redo] = reference(m[redo])
    return uh.to(x.dtype), s.to(x.dtype), vh.to(x.dtype)


def _refuses(x: Tensor | None = None) -> str | None:
    return native.refuses([] if x is None else [x])


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

    u, s, vh = batched_svd(x)
    return u.mT.contiguous(), s, vh


register(
    "batched_svd",
    Backend("cpu", _refuses, _cpu),
    Backend("gpu", _gpu_refuses, _gpu),
    Backend("reference", lambda *_: None, reference),
)

_op = define(
    "batched_svd",
    "(Tensor x) -> (Tensor uh, Tensor s, Tensor vh)",
    _batched_svd,
    lambda x: (x.new_empty(x.shape), x.new_empty(x.shape[:2]), x.new_empty(x.shape)),
)

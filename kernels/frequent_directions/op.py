"""The public function, its backends, and the registered op between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_fast.backends import Backend, define, pick, register
from spectral_fast.kernels import native


def frequent_directions(basis: Tensor, squares: Tensor, z: Tensor) -> tuple[Tensor, Tensor, float]:
    """The best k directions of U diag(s²) Uᵀ + z zᵀ, with what is left of it taken off.

    Args:
        basis: Uᵀ, (k, m) float64: as many orthonormal rows as there are positive squares, zeros below.
        squares: s², (k,) float64, descending, not negative.
        z: (m,) float64; one below 1e-154, whose square has too few digits, is no direction.

    Returns:
        basis (k, m) and squares (k,) of the same kind, and the eigenvalue δ that was taken off all others: 0 as long as
        there are no more than k. The rows are orthonormal to rounding, however close eigenvalues are.

    Raises:
        ValueError: shapes or devices do not fit, or z holds a NaN or an infinity.
        TypeError: a dtype is not float64.

    Cost: 2 k² m flops for the new rows; 40 k² and 8 k m for the rest.
    """
    new, new_squares, removed = _op(basis.detach(), squares.detach(), z.detach())
    return new, new_squares, float(removed)


def _frequent_directions(basis: Tensor, squares: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tensors = basis, squares, z
    if (
        squares.ndim != 1
        or z.ndim != 1
        or basis.shape != (len(squares), len(z))
        or len({x.device for x in tensors}) > 1
    ):
        told = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise ValueError(f"basis must be (k, m), squares (k,), z (m,), on one device; got {told}")
    if any(x.dtype != torch.float64 for x in tensors):
        raise TypeError(f"basis, squares and z must be float64, got {', '.join(str(x.dtype) for x in tensors)}")
    new, new_squares, removed = pick("frequent_directions", *tensors).call(*tensors)
    if math.isnan(removed):
        raise ValueError("z holds a NaN or an infinity, or its length is none")
    return new, new_squares, squares.new_tensor(removed)


def reference(basis: Tensor, squares: Tensor, z: Tensor) -> tuple[Tensor, Tensor, float]:
    """The definition, by an SVD of [U diag(s) | z]; its U is orthonormal where the values are not negligible."""
    if not z.isfinite().all():
        return basis, squares, math.nan
    k = len(squares)
    vectors, s, _ = torch.linalg.svd(torch.cat([basis * squares.sqrt()[:, None], z[None]]).mT, full_matrices=False)
    values = s.square()
    removed = values[k] if len(values) > k else values.new_zeros(())
    new, new_squares = torch.zeros_like(basis), torch.zeros_like(squares)
    kept = values[:k] - removed
    count = int((kept > len(values) * torch.finfo(torch.float64).eps * values[0]).sum())
    new[:count], new_squares[:count] = vectors.mT[:count], kept[:count]
    return new, new_squares, float(removed)


def _cpu(basis: Tensor, squares: Tensor, z: Tensor) -> tuple[Tensor, Tensor, float]:
    from spectral_fast import _C

    basis, squares, z = (native.readable(x) for x in (basis, squares, z))
    new, new_squares = torch.empty_like(basis), torch.empty_like(squares)
    removed = _C.frequent_directions(basis.numpy(), squares.numpy(), z.numpy(), new.numpy(), new_squares.numpy())
    return new, new_squares, removed


def _refuses(*tensors: Tensor) -> str | None:
    return native.refuses(tensors)


register(
    "frequent_directions",
    Backend("cpu", _refuses, _cpu),
    Backend("reference", lambda *_: None, reference),
)

_op = define(
    "frequent_directions",
    "(Tensor basis, Tensor squares, Tensor z) -> (Tensor, Tensor, Tensor)",
    _frequent_directions,
    lambda basis, squares, z: (basis.new_empty(basis.shape), squares.new_empty(squares.shape), z.new_empty(())),
)

"""The leading directions of a matrix that is read in blocks of rows, and how much of it they miss.

With D (m, n), each pass over the rows gives Z = Σ D_iᵀ (D_i Q) = DᵀD Q, whose orthonormal basis is the next Q: subspace
iteration from random columns. The last pass gives Y = D Q; Y Qᵀ is D projected on the rows found.

Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithm 4.4 for Dᵀ
and the estimate of section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = Callable[[], Iterator[tuple[int, Tensor]]]  # (first row, rows), anew at every call
_PROBES = 8
_CANCELS = 1e-4  # below this share of ‖D‖² the difference of two sums is mostly rounding


@dataclass(frozen=True)
class Projection:
    """D on a space of rows: D ≈ y q.

    Attributes:
        y: (m, l).
        q: (l, n), orthonormal rows.
        energy: ‖D‖_F².
        missed: ‖D − y q‖_F², what the space does not hold: exact but for rounding, or estimated if it is small.
    """

    y: Tensor
    q: Tensor
    energy: float
    missed: float


def project(
    blocks: Blocks,
    shape: tuple[int, int],
    columns: int,
    passes: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    start: Tensor | None = None,
) -> Projection | None:
    """The space of about the leading right singular vectors of a matrix, and the matrix on it.

    Args:
        blocks: gives the rows of D, in blocks of the dtype; `passes` + 1 times, or once if the space is all.
        shape: (m, n) of D.
        columns: dimension of the space, l; at most min(m, n) are needed.
        passes: products with DᵀD.
        generator: of random columns, on the CPU.
        dtype: float32 or float64.
        start: (l', n) orthonormal rows found earlier, to begin with.

    Returns:
        None if D is zero.

    Raises:
        ValueError: D is not finite.

    Cost: (4 passes + 2) m n l flops; memory for (m + 3 n) l numbers and a block.
    """
    m, n = shape
    if columns >= min(shape):
        return _whole(blocks, shape, dtype)
    q = torch.randn(n, columns, generator=generator, dtype=torch.float32).to(dtype)
    if start is not None:
        q[:, : len(start)] = start.mT
    energy = 0.0
    for number in range(passes):
        z = torch.zeros_like(q)
        for _, rows in blocks():
            z.addmm_(rows.mT, rows @ q)
            if number == 0:
                energy += _energy(rows)
        if not _is_something(energy):
            return None
        q = torch.linalg.qr(z).Q
    probes = torch.randn(n, _PROBES, generator=generator, dtype=torch.float32).to(dtype)
    both, y, missed = torch.cat([q, probes], 1), q.new_empty(m, columns), 0.0
    image = q.mT @ probes
    for first, rows in blocks():
        product = rows @ both
        y[first : first + len(rows)] = product[:, :columns]
        # E ‖(D − Y Qᵀ) g‖² = ‖D − Y Qᵀ‖_F² for g of independent entries of variance 1.
        missed += _energy(product[:, columns:] - product[:, :columns] @ image) / _PROBES
    left = energy - _energy(y)  # Pythagoras: Y Qᵀ is D on a subspace
    return Projection(y, q.mT, energy, left if left > _CANCELS * energy else missed)


def _whole(blocks: Blocks, shape: tuple[int, int], dtype: torch.dtype) -> Projection | None:
    """All of D, if the space would be."""
    m, n = shape
    d = torch.empty(shape, dtype=dtype)
    for first, rows in blocks():
        d[first : first + len(rows)] = rows
    energy = _energy(d)
    if not _is_something(energy):
        return None
    if n <= m:
        return Projection(d, torch.eye(n, dtype=dtype), energy, 0.0)
    q, r = torch.linalg.qr(d.mT)
    return Projection(r.mT, q.mT, energy, 0.0)


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _is_something(energy: float) -> bool:
    if not math.isfinite(energy):
        raise ValueError(
            "the difference of base and tuned weights has NaN or infinite values; mend the checkpoint first"
        )
    return energy > 0

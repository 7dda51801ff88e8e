"""Adapters in memory: seeded random factors with known condition numbers, and where the rebuilt factors go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The modules of an adapter, in memory, and where the rebuilt factors go.

    Attributes:
        bs: of each module B (m, r).
        as_: of each module A (r, n).
        s_new: of each module the singular values (r,) float64 to rebuild with.
        outs: of each module the memory for B' and A'.
    """

    bs: list[Tensor]
    as_: list[Tensor]
    s_new: list[Tensor]
    outs: list[tuple[Tensor, Tensor]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]]:
        return zip(self.bs, self.as_, self.s_new, self.outs, strict=True)

    def only(self, module: int) -> Factors:
        """One module alone."""
        return Factors([self.bs[module]], [self.as_[module]], [self.s_new[module]], [self.outs[module]])


def adapter_factors(
    shapes: Sequence[tuple[int, int]], rank: int, dtype: torch.dtype, kappas: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """B (m, r) and A (r, n) of modules of these shapes (m, n), with these condition numbers.

    A Gaussian matrix with far more rows than columns has orthogonal columns but for a few per cent, so its
    product with an r × r matrix has about that matrix' condition number, and no tall QR is needed. One
    Gaussian serves all factors of a length; the r × r matrices differ. Rounding to bfloat16 adds noise of
    2⁻⁹ per entry, above the smallest singular values where κ is larger than some hundreds: as in real files.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({length for shape in shapes for length in shape})
    tall = {length: torch.randn(length, rank, generator=generator) / length**0.5 for length in lengths}
    bs, as_ = [], []
    for (m, n), kappa in zip(shapes, kappas, strict=True):
        cores = conditioned(2, rank, kappa, generator).float()
        bs.append((tall[m] @ cores[0]).to(dtype))
        as_.append((tall[n] @ cores[1]).to(dtype).mT.contiguous())
    return bs, as_


def with_outputs(bs: list[Tensor], as_: list[Tensor]) -> Factors:
    """Factors to be rebuilt with s' = 1, and memory for the results."""
    outs = [(torch.empty_like(b), torch.empty_like(a)) for b, a in zip(bs, as_, strict=True)]
    ones = [torch.ones(b.shape[1], dtype=torch.float64, device=b.device) for b in bs]
    return Factors(bs, as_, ones, outs)


def splines(rows: int, columns: int, knots: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Elements x, dy and, in float32, values, input scale and output scale; 3 elements in 100 beyond the grid [-3, 3].

    No x falls on a knot, where a slope would be whichever of two.
    """
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, rows, columns, generator=generator)
    values = torch.linspace(-3, 3, knots) + 0.2 * torch.randn(knots, generator=generator)
    made = ((1.4 * x).to(dtype), (1 + dy).to(dtype), values, torch.tensor([0.9]), torch.tensor([1.1]))
    return tuple(t.to(device) for t in made)


def conditioned(count: int, rank: int, kappa: float, generator: torch.Generator) -> Tensor:
    """`count` matrices (r, r) float64 with singular values from 1 to 1/κ, evenly in the logarithm."""
    gaussians = torch.randn(2, count, rank, rank, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(gaussians)[0]
    s = torch.logspace(0, -math.log10(kappa), rank, dtype=torch.float64)
    product: Tensor = (left * s) @ right
    return product

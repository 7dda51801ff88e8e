"""The tensors of a workload: seeded random factors and cores with known condition numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Adapter, Cores, Projections, spread


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


def adapter_factors(case: Adapter) -> tuple[list[Tensor], list[Tensor]]:
    """B and A of every module, with condition numbers spread over the modules.

    A Gaussian matrix with far more rows than columns has orthogonal columns but for a few per cent, so its
    product with an r × r matrix has about that matrix' condition number, and no tall QR is needed. One
    Gaussian serves all factors of a length; the r × r matrices differ. Rounding to bfloat16 adds noise of
    2⁻⁹ per entry, above the smallest singular values where κ is larger than some hundreds: as in real files.
    """
    generator = torch.Generator().manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)
    lengths = sorted({length for shape in case.shapes().values() for length in shape})
    tall = {length: torch.randn(length, case.rank, generator=generator) / length**0.5 for length in lengths}
    bs, as_ = [], []
    for (m, n), kappa in zip(case.shapes().values(), spread(len(case.shapes())), strict=True):
        cores = conditioned(2, case.rank, kappa, generator).float()
        bs.append((tall[m] @ cores[0]).to(dtype))
        as_.append((tall[n] @ cores[1]).to(dtype).mT.contiguous())
    return bs, as_


def with_outputs(case: Adapter) -> Factors:
    """The factors of a case, to be rebuilt with s' = 1, and memory for the results."""
    bs, as_ = adapter_factors(case)
    outs = [(torch.empty_like(b), torch.empty_like(a)) for b, a in zip(bs, as_, strict=True)]
    return Factors(bs, as_, [torch.ones(case.rank, dtype=torch.float64)] * len(bs), outs)


def conditioned(count: int, rank: int, kappa: float, generator: torch.Generator) -> Tensor:
    """`count` matrices (r, r) float64 with singular values from 1 to 1/κ, evenly in the logarithm."""
    gaussians = torch.randn(2, count, rank, rank, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(gaussians)[0]
    s = torch.logspace(0, -math.log10(kappa), rank, dtype=torch.float64)
    product: Tensor = (left * s) @ right
    return product


def core_matrices(case: Cores) -> Tensor:
    """The batch (count, r, r) float64; condition numbers as in the adapters."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([conditioned(1, case.rank, kappa, generator) for kappa in spread(case.count)])


def projections(case: Projections) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(p, q) of each module, and the first token of each sample with the number of tokens last."""
    generator = torch.Generator().manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)
    cuts = torch.randperm(case.tokens - 1, generator=generator)[: case.samples - 1] + 1
    starts = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([case.tokens])])
    shape = (case.modules, 2, case.tokens, case.rank)
    return [(pq[0], pq[1]) for pq in torch.randn(shape, generator=generator).to(dtype)], starts

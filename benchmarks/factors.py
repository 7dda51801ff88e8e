"""The tensors of a workload: seeded random factors and cores with known condition numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Adapter, Cores, Projections, spread
from spectral_fast.bench import factors
from spectral_fast.bench.factors import Factors, conditioned


def adapter_factors(case: Adapter) -> tuple[list[Tensor], list[Tensor]]:
    """B and A of every module, with condition numbers spread over the modules."""
    shapes = list(case.shapes().values())
    return factors.adapter_factors(shapes, case.rank, getattr(torch, case.dtype), spread(len(shapes)))


def with_outputs(case: Adapter) -> Factors:
    """The factors of a case, to be rebuilt with s' = 1, and memory for the results."""
    return factors.with_outputs(*adapter_factors(case))


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

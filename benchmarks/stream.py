"""Vectors folded one by one into k directions, beside an SVD of the m × (k + 1) matrix for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Stream
from benchmarks.tasks import OURS, SVD_EACH, WITHOUT_WEIGHTS
from benchmarks.workloads import Candidate, Workload
from spectral_fast.bench.gate import RATIO, WrongResult
from spectral_fast.training.gate import FrequentDirections

Found = tuple[Tensor, Tensor, float]  # basis (k, m), squares (k,), and the sum of what was taken off


def vectors(case: Stream) -> Tensor:
    """Directions of which some come again and again: a decaying spectrum, as gradients have."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(case.vectors, case.m, generator=generator) / torch.arange(1, case.m + 1).sqrt()
    return torch.nn.functional.normalize(rows)


def ours(case: Stream, rows: Tensor, mode: str = "liberty") -> Found:
    """As the gate does."""
    sketch = FrequentDirections(case.m, case.k, mode)
    for z in rows:
        sketch.update(z)
    return sketch.basis, sketch.squares, sketch.error


def by_svd(case: Stream, rows: Tensor) -> Found:
    """As published: an SVD of the sketch with the vector beside it, in float32."""
    sketch, total = torch.zeros(case.m, 0), 0.0
    basis, s = sketch, torch.zeros(0)
    for z in rows:
        basis, s, _ = torch.linalg.svd(torch.cat([sketch, z[:, None]], 1), full_matrices=False)
        if len(s) > case.k:
            least = float(s[case.k] ** 2)
            total += least
            basis, s = basis[:, : case.k], (s[: case.k] ** 2 - least).clamp(min=0).sqrt()
        sketch = basis * s
    return basis.mT, s**2, total


RUNS: dict[str, Callable[[Stream, Tensor], Found]] = {
    OURS: ours,
    WITHOUT_WEIGHTS: partial(ours, mode="orthonormal"),
    SVD_EACH: by_svd,
}


def check(name: str, gram: Tensor, found: Found) -> None:
    """The basis is orthonormal; and what the sketch misses of the Gram matrix lies between 0 and its error bound."""
    basis, squares, error = found
    eps = torch.finfo(basis.dtype).eps
    unit = RATIO * eps * float(gram.trace())  # rounding grows with the number of updates, as the trace does
    wide = basis.double()
    off = float((wide @ wide.mT - torch.eye(len(wide), dtype=torch.float64)).norm())
    if not off <= unit:
        raise WrongResult(f"{name}: the basis is orthonormal to {off:.2g} only")
    if name != WITHOUT_WEIGHTS:
        missing = torch.linalg.eigvalsh(gram - (wide.mT * squares.double()) @ wide)
        if not (missing[0] >= -unit and missing[-1] <= error + unit):
            raise WrongResult(f"{name}: the sketch misses from {missing[0]:.2g} to {missing[-1]:.2g}, not 0 to {error}")


def updates(case: Stream, names: Sequence[str]) -> Workload:
    """A stream. Floor: per vector, the product of the new basis, 2 m k (k + 1) operations; a basis read and written."""
    rows = vectors(case)
    gram = rows.double().mT @ rows.double()
    candidates = (
        Candidate(name, partial(run, case, rows[:3]), partial(run, case, rows), partial(check, name, gram))
        for name in names
        for run in [RUNS[name]]
    )
    basis = torch.zeros(case.k, case.m, dtype=torch.float64)
    flops = 2 * case.m * case.k * (case.k + 1) * case.vectors
    nbytes = 2 * basis.nbytes * case.vectors
    return Workload(candidates, [(torch.empty_like(basis), basis)], nbytes, flops, (torch.float64,))

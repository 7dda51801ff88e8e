"""From a case to what is timed: every implementation with its input and its check, and what it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import TINY, Adapter, Cores, Elements, Projections
from benchmarks.factors import core_matrices, projections, with_outputs
from spectral_fast.bench import gate, least
from spectral_fast.bench.factors import splines
from spectral_fast.bench.peers import splined


@dataclass(frozen=True)
class Candidate:
    """An implementation with its input.

    Attributes:
        name: of the implementation.
        warm_up: the same on something small: imports, threads, and code pages, which a first run would pay for.
        run: does the work.
        check: raises ``WrongResult`` if what `run` returned is wrong.
        share: the part of the case that `run` does.
        saved: counts the bytes that autograd keeps for the backward pass.
    """

    name: str
    warm_up: Callable[[], Any]
    run: Callable[[], Any]
    check: Callable[[Any], None]
    share: float = 1.0
    saved: Callable[[], int] | None = None


@dataclass(frozen=True)
class Workload:
    """A case with its candidates and its floor.

    Attributes:
        candidates: one per implementation; each is made when its turn comes.
        copied: (destination, source) of the copy that measures the bandwidth.
        nbytes: bytes that must be read and written.
        flops: operations that must be done.
        dtypes: in which they may be done.
        tokens: of calibration samples.
    """

    candidates: Iterator[Candidate]
    copied: list[tuple[Tensor, Tensor]]
    nbytes: int
    flops: int
    dtypes: tuple[torch.dtype, ...]
    tokens: int | None = None


def rebuild(case: Adapter, names: Sequence[str]) -> Workload:
    """The singular values and new factors of an adapter.

    Floor: the factors are read twice and written once. For a factor of length l the half of a Gram matrix takes
    l r² operations and a product with an r × r matrix 2 l r²; what is done to r × r matrices is left out.
    Products of bfloat16 may be taken in float32, where that is faster.
    """
    factors = with_outputs(case)
    # The reference says which singular values are right, and so which ones to rebuild with.
    true_s = peers.by_reference(factors)
    factors = replace(factors, s_new=[gate.amplified(s) for s in true_s])
    small = with_outputs(replace(case, model=TINY, rank=min(case.rank, 8)))
    shapes = list(case.shapes().values())
    smallest = min(range(len(shapes)), key=lambda i: shapes[i][0] * shapes[i][1])

    def candidates() -> Iterator[Candidate]:
        for name in names:
            part, s, share = factors, true_s, 1.0
            if cost := peers.DENSE_COST.get(name):
                costs = [cost(m, n, case.rank) for m, n in shapes]
                part, s, share = factors.only(smallest), true_s[smallest : smallest + 1], costs[smallest] / sum(costs)
            for out in part.outs:
                for x in out:
                    x.fill_(torch.nan)  # what a predecessor wrote must not count
            run, check = peers.REBUILD[name], partial(gate.check_rebuilt, name, part, s)
            yield Candidate(name, partial(run, small), partial(run, part), check, share)

    copied = [pair for b, a, _, (b_out, a_out) in factors for pair in ((b_out, b), (a_out, a))]
    flops = 3 * sum(m + n for m, n in shapes) * case.rank**2
    return Workload(candidates(), copied, 3 * case.nbytes, flops, (getattr(torch, case.dtype), torch.float32))


def svd(case: Cores, names: Sequence[str]) -> Workload:
    """U, s and Vᵀ of a batch of small matrices.

    Floor: 21 r³ operations, Golub and Van Loan's count for a square matrix (Matrix Computations, on the SVD).
    """
    matrices = core_matrices(case)
    candidates = (
        Candidate(name, partial(run, matrices[:2]), partial(run, matrices), partial(gate.check_svd, name, matrices))
        for name in names
        for run in [peers.SVD[name]]
    )
    nbytes = 3 * matrices.nbytes + matrices.nbytes // case.rank
    flops = 21 * case.count * case.rank**3
    return Workload(candidates, [(torch.empty_like(matrices), matrices)], nbytes, flops, (torch.float64,))


def sensitivity(case: Projections, names: Sequence[str]) -> Workload:
    """Sums of p ⊙ q over the tokens of every sample. Floor: p and q are read once."""
    pairs, starts = projections(case)
    candidates = (
        Candidate(
            name,
            partial(run, pairs[:1], starts),
            partial(run, pairs, starts),
            partial(gate.check_sensitivity, name, pairs, starts),
        )
        for name in names
        for run in [peers.SENSITIVITY[name]]
    )
    nbytes = sum(p.nbytes + q.nbytes for p, q in pairs)
    flops = 2 * sum(p.numel() for p, _ in pairs)
    return Workload(candidates, [(torch.empty_like(p), p) for p, _ in pairs], nbytes, flops, (torch.float32,))


def spline(case: Elements, names: Sequence[str]) -> Workload:
    """A spline and all its gradients. Floor: x is read and y written, then x and dy read and dx written."""
    x, dy, *parameters = splines(case.rows, case.columns, case.knots, getattr(torch, case.dtype), torch.device("cpu"))
    truth = gate.splined_in_float64(x, dy, *parameters)
    candidates = (
        Candidate(
            name,
            partial(splined, run, x[:64], dy[:64], *parameters),
            partial(splined, run, x, dy, *parameters),
            partial(gate.check_terms, truth, name),
            saved=partial(saved, run, x, *parameters),
        )
        for name in names
        for run in [peers.SPLINE[name]]
    )
    work, back = least.spline(x.numel(), x.element_size(), False), least.spline_backward(x.numel(), x.element_size())
    flops = work.flops["float32"] + back.flops["float32"]
    return Workload(candidates, [(torch.empty_like(x), x)], work.nbytes + back.nbytes, flops, (torch.float32,))


def saved(run: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each memory once."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = run(*(t.detach().requires_grad_() for t in inputs))
    del y
    return sum(kept.values())

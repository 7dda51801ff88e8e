"""Where the adapters' updates ΔW_i = s_i B_i A_i of one module are combined, and the merged update in factors again.

    sum     Σ w_i ΔW_i = [w_1 s_1 B_1 …] [A_1; …], whose SVD needs no dense matrix
    core    M_i = Uᵀ ΔW_i V, with U and V the singular vectors of [B_1 …] and [A_1; …]; ΔW = U M Vᵀ
            (Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025)
    knots   M_i = Uᵀ ΔW_i, with U the left singular vectors of [ΔW_1 …]; ΔW = U M
            (Stoica et al., "Model merging with SVD to tie the KnOTS", ICLR 2025)
    tsv     ΔW = P diag(w_i s_i …) Qᵀ, with P and Q the nearest orthonormal matrices to the left and the right singular
            vectors of all ΔW_i side by side (Gargiulo et al., "Task Singular Vectors", CVPR 2025)
    dense   ΔW_i itself: what is defined entry by entry on it has no smaller form

R = Σ r_i. All of core, knots and tsv happens in matrices of R × R, but for one R × n per adapter in knots. Modules
of one shape go through each step together: of thousands of tiny ones, calls would take most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_fast.adapter import LoraModule
from spectral_fast.adapter.folder import is_finite
from spectral_fast.kernels.batched_svd import batched_svd
from spectral_fast.kernels.lowrank_svd import Factored
from spectral_fast.spectrum import Spectrum, lowrank_svd
from spectral_fast.toolbox.measures import EPS32
from spectral_fast.toolbox.merging.entries import Combined

SMALL = 256  # side of a dense matrix


class Task(NamedTuple):
    """What the adapter in a folder has for a module: b (m, r) and a (r, n) as stored, and its weight w."""

    b: Tensor
    a: Tensor
    weight: float
    module: LoraModule
    folder: Path


Tasks = Sequence[Task]  # of one module


@dataclass(frozen=True, eq=False)
class Group:
    """Modules of one shape, with tasks of the same ranks.

    Attributes:
        bs: (modules, m, r_i) of each task, float32 or float64.
        as_: (modules, r_i, n) of each task.
        scalings: (tasks, modules, 1, 1) float64.
        weights: as these.
    """

    bs: list[Tensor]
    as_: list[Tensor]
    scalings: Tensor
    weights: Tensor

    @classmethod
    def of(cls, modules: Sequence[Tasks]) -> Group:
        """Stack them; ValueError if a value is not finite."""
        tasks = list(zip(*modules, strict=True))
        wide = torch.float64 if any(each[0].b.dtype == torch.float64 for each in tasks) else torch.float32
        numbers = torch.tensor([[(x.module.scaling, x.weight) for x in each] for each in tasks], dtype=torch.float64)
        bs = [torch.stack([x.b for x in each]).to(wide) for each in tasks]
        as_ = [torch.stack([x.a for x in each]).to(wide) for each in tasks]
        if not all(map(is_finite, (*bs, *as_))):
            bad = next(x for each in modules for x in each if not (is_finite(x.b) and is_finite(x.a)))
            key = bad.module.a_key if is_finite(bad.b) else bad.module.b_key
            raise ValueError(f"{key} of {bad.folder} has NaN or infinite values: mend the adapter first")
        return cls(bs, as_, *numbers.movedim(2, 0)[..., None, None])

    @property
    def shares(self) -> Tensor:
        """Weights times scalings."""
        return self.weights * self.scalings

    @property
    def ranks(self) -> list[int]:
        """r_i of each task."""
        return [a.shape[1] for a in self.as_]


# `entries.combine` of a method: matrices and weights, and how many entries of each module are meant by all
Combine = Callable[[Sequence[Tensor], Tensor, Sequence[int] | None], Combined]


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged update as a spectrum, and the share of votes for the elected signs, if there was an election."""

    spectrum: Spectrum
    agreement: float | None = None


def shape_of(tasks: Tasks) -> tuple[Any, ...]:
    """What modules of one group have in common."""
    return tuple((task.b.shape, task.a.shape, task.b.dtype) for task in tasks)


def entries_of(tasks: Tasks, space: str) -> int:
    """How many numbers are combined for a module."""
    m, n, r = len(tasks[0].b), tasks[0].a.shape[1], sum(len(task.a) for task in tasks)
    return {"dense": len(tasks) * m * n, "core": len(tasks) * r * r, "knots": len(tasks) * r * n}.get(
        space, r * (m + n)
    )


def by_sum(group: Group, names: Sequence[str]) -> list[Merged]:
    """Σ w s B A of each module."""
    bs = torch.cat([b * share.to(b) for b, share in zip(group.bs, group.shares, strict=True)], 2)
    return [Merged(spectrum) for spectrum in lowrank_svd(list(bs), list(torch.cat(group.as_, 1)), names)]


def by_core(group: Group, names: Sequence[str], combine: Combine) -> list[Merged]:
    """Combined in the coordinates of common bases of both sides."""
    left, right = _left(group, names), _flat(torch.cat(group.as_, 1), names)
    rows = torch.split(_u(right) * _s(right)[:, None], group.ranks, 1)  # A_i V
    present = _both_present(left, right)
    pairs = zip(group.scalings, _coordinates(left, group), rows, strict=True)
    cores = _without_rounding(group, [scaling * (x @ y) * present for scaling, x, y in pairs])
    core, agreements = combine(cores, group.weights, _sizes(present))
    return _recomposed(left, core, right, agreements)


def by_knots(group: Group, names: Sequence[str], combine: Combine) -> list[Merged]:
    """Combined in the coordinates of a common basis of the left side."""
    left = _left(group, names)
    columns = _coordinates(left, group)
    parts = [_u(x) * _s(x)[:, None] for x in (_flat(a, names) for a in group.as_)]
    triples = zip(group.scalings, columns, parts, strict=True)
    w, s, _ = batched_svd(torch.cat([scaling * x @ y for scaling, x, y in triples], 2))
    present = _present(s)[:, None]
    w = w * present
    triples = zip(group.scalings, columns, group.as_, strict=True)
    rows = _without_rounding(group, [(scaling * (w.mT @ x)).to(a) @ a for scaling, x, a in triples])
    merged, agreements = combine(rows, group.weights, [n * rows[0].shape[2] for n in _sizes(present)])
    bases = (_u(left) @ w).to(merged)
    return list(map(Merged, lowrank_svd(list(bases), list(merged), names), agreements))


def by_tsv(group: Group, names: Sequence[str], density: float) -> list[Merged]:
    """The tasks' singular vectors made orthogonal; of each task the best, so many that all together can be."""
    us, vs, values = [], [], []
    for b, a, share in zip(group.bs, group.as_, group.shares, strict=True):
        spectra = lowrank_svd(list(b), list(a), names)
        k = tsv_rank(a.shape[1], min(b.shape[1], a.shape[2]), len(group.bs), density)
        s = _s(spectra)[:, :k]
        present = _present(s)[:, None]  # where s = 0, u and v are any vectors
        us.append(_u(spectra)[:, :, :k] * present)
        vs.append(_v(spectra)[:, :, :k] * present)
        values.append(s[:, None] * share)
    u, v = (torch.cat(x, 2).to(group.bs[0]) for x in (us, vs))
    left, right = _tall(u, names), _flat(v.mT.contiguous(), names)
    core = (_v(left).mT * torch.cat(values, 2)) @ _u(right) * _both_present(left, right)
    return _recomposed(left, core, right, [None] * len(names))


def tsv_rank(r: int, side: int, tasks: int, density: float) -> int:
    """How many directions of rank r each of some tasks keeps: a share of them, and no more than fit in a side."""
    return max(1, min(side // tasks, math.ceil(round(density * r, 9))))


def by_dense(group: Group, names: Sequence[str], combine: Combine) -> list[Merged]:
    """Combined as they are."""
    dense, agreements = _dense(group, combine)
    _, m, n = dense.shape
    if min(m, n) > SMALL:
        spectra = list(map(_by_lapack, dense))
    else:  # LAPACK's threads would make small matrices up to 100 times slower
        spectra = _tall(dense, names) if n <= m else _flat(dense, names)
    return list(map(Merged, spectra, agreements))


def dense_values(group: Group, names: Sequence[str], combine: Combine) -> list[Tensor]:
    """The singular values of `by_dense` alone."""
    dense, _ = _dense(group, combine)
    if min(dense.shape[1:]) > SMALL:
        return list(torch.linalg.svdvals(dense).double())
    return [x.s for x in (_tall if dense.shape[2] <= dense.shape[1] else _flat)(dense, names)]


def _dense(group: Group, combine: Combine) -> Combined:
    triples = zip(group.bs, group.as_, group.scalings, strict=True)
    return combine([(b @ a) * scaling.to(b) for b, a, scaling in triples], group.weights, None)


def _by_lapack(x: Tensor) -> Spectrum:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    eye = torch.eye(len(s), dtype=torch.float64)
    return Spectrum(Factored(u, eye, s.double(), eye, vh), (x.dtype, x.dtype))


def _left(group: Group, names: Sequence[str]) -> list[Spectrum]:
    """SVDs of [B_1 …]."""
    return _tall(torch.cat(group.bs, 2), names)


def _tall(x: Tensor, names: Sequence[str]) -> list[Spectrum]:
    """SVDs of x (modules, m, r)."""
    return lowrank_svd(list(x), [torch.eye(x.shape[2], dtype=x.dtype)] * len(x), names)


def _flat(x: Tensor, names: Sequence[str]) -> list[Spectrum]:
    """SVDs of x (modules, r, n)."""
    return lowrank_svd([torch.eye(x.shape[1], dtype=x.dtype)] * len(x), list(x), names)


def _coordinates(left: Sequence[Spectrum], group: Group) -> Sequence[Tensor]:
    """Uᵀ B_i (modules, R, r_i) of each task, U the left vectors of [B_1 …]."""
    return torch.split(_s(left)[:, :, None] * _v(left).mT, group.ranks, 2)


def _without_rounding(group: Group, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Of each task x = Uᵀ ΔW_i (V), zero where that is rounding, of which an election would count the sign."""
    kept = []
    for b, a, scaling, x in zip(group.bs, group.as_, group.scalings, matrices, strict=True):
        norms = (torch.linalg.vector_norm(factor, dim=(1, 2), keepdim=True) for factor in (b, a))
        size = scaling.abs() * math.prod(norms)
        kept.append(x * ((x.abs() > x.shape[1] * EPS32 * size) & (size > 0)))
    return kept


def _s(spectra: Sequence[Spectrum]) -> Tensor:
    return torch.stack([x.s for x in spectra])


def _u(spectra: Sequence[Spectrum]) -> Tensor:
    """U (modules, m, r), float64."""
    return torch.stack([x.factored.basis_b for x in spectra]).double() @ torch.stack([x.factored.t_b for x in spectra])


def _v(spectra: Sequence[Spectrum]) -> Tensor:
    """V (modules, n, r), float64."""
    bases = torch.stack([x.factored.basis_a for x in spectra])
    return bases.double().mT @ torch.stack([x.factored.t_a for x in spectra])


def _present(s: Tensor) -> Tensor:
    """Of s (modules, r), descending: 1 where it is not zero, but for rounding."""
    return (s > s.shape[1] * EPS32 * s[:, :1]).to(s)


def _both_present(left: Sequence[Spectrum], right: Sequence[Spectrum]) -> Tensor:
    """(modules, R, R)."""
    return _present(_s(left))[:, :, None] * _present(_s(right))[:, None]


def _sizes(present: Tensor) -> list[int]:
    """How many are present in each module, one at least: the others are no entries to count, keep or drop."""
    return present.sum((1, 2)).clamp(min=1).int().tolist()


def _recomposed(
    left: Sequence[Spectrum], cores: Tensor, right: Sequence[Spectrum], agreements: Sequence[float | None]
) -> list[Merged]:
    """The spectra of U M Vᵀ, U the left vectors of `left` and V the right ones of `right`."""
    merged = []
    p, s, qh = batched_svd(cores)
    t_b = torch.stack([x.factored.t_b for x in left]) @ p
    t_a = torch.stack([x.factored.t_a for x in right]) @ qh.mT
    root = math.sqrt(s.shape[1])
    for x, y, values, agreement, tall, flat in zip(left, right, s, agreements, t_b, t_a, strict=True):
        amplification = root * max(x.factored.amplification, y.factored.amplification)
        f = Factored(x.factored.basis_b, tall, values, flat, y.factored.basis_a, amplification)
        merged.append(Merged(Spectrum(f, (x.dtypes[0], y.dtypes[1])), agreement))
    return merged

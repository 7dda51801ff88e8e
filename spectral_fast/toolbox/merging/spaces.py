"""Where the adapters' updates ΔW_i = s_i B_i A_i of one module are combined, and the merged update in factors again.

    sum     Σ w_i ΔW_i = [w_1 s_1 B_1 …] [A_1; …], whose SVD needs no dense matrix
    core    M_i = Uᵀ ΔW_i V, with U and V the singular vectors of [B_1 …] and [A_1; …]; ΔW = U M Vᵀ
            (Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025)
    knots   M_i = Uᵀ ΔW_i, with U the left singular vectors of [ΔW_1 …]; ΔW = U M
            (Stoica et al., "Model merging with SVD to tie the KnOTS", ICLR 2025)
    tsv     ΔW = P diag(w_i s_i …) Qᵀ, with P and Q the nearest orthonormal matrices to the left and the right singular
            vectors of all ΔW_i side by side (Gargiulo et al., "Task Singular Vectors", CVPR 2025)
    dense   ΔW_i itself, one module at a time: what is defined entry by entry on it has no smaller form

R = Σ r_i. All of core, knots and tsv happens in matrices of R × R, but for one R × n per adapter in knots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectral_fast.kernels.batched_svd import batched_svd
from spectral_fast.kernels.lowrank_svd import Factored
from spectral_fast.kernels.recompose import Product, recompose
from spectral_fast.spectrum import Spectrum, lowrank_svd
from spectral_fast.toolbox.measures import EPS32
from spectral_fast.toolbox.merging.entries import Combined

Combine = Callable[[Sequence[Tensor], Sequence[float]], Combined]  # matrices and weights


class Task(NamedTuple):
    """What one adapter has for a module: b (m, r) and a (r, n), float32 or float64, the scaling s and the weight w."""

    b: Tensor
    a: Tensor
    scaling: float
    weight: float

    @property
    def share(self) -> float:
        """Weight times scaling."""
        return self.weight * self.scaling


Tasks = Sequence[Task]  # of one module


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged update as a spectrum, and the share of votes for the elected signs, if there was an election."""

    spectrum: Spectrum
    agreement: float | None = None


def by_sum(modules: Sequence[Tasks], names: Sequence[str]) -> list[Merged]:
    """Σ w s B A of each module."""
    bs = [torch.cat([task.b * task.share for task in tasks], 1) for tasks in modules]
    return [Merged(spectrum) for spectrum in lowrank_svd(bs, _stacked(modules), names)]


def by_core(modules: Sequence[Tasks], names: Sequence[str], combine: Combine) -> list[Merged]:
    """Combined in the coordinates of common bases of both sides."""
    left, right = _left(modules, names), _right(modules, names)
    combined = []
    for tasks, tall, flat in zip(modules, left, right, strict=True):
        rows = torch.split(_u(flat) * flat.s, [len(task.a) for task in tasks])  # A_i V
        p, q = _directions(tall.s), _directions(flat.s)
        pairs = zip(tasks, _coordinates(tall, tasks), rows, strict=True)
        cores = [_without_rounding(task, task.scaling * (x[:p] @ y[:, :q])) for task, x, y in pairs]
        core, agreement = combine(cores, [task.weight for task in tasks])
        combined.append(Combined(pad(core, (0, len(flat.s) - q, 0, len(tall.s) - p)), agreement))
    return _recomposed(left, [x.matrix for x in combined], right, [x.agreement for x in combined])


def by_knots(modules: Sequence[Tasks], names: Sequence[str], combine: Combine) -> list[Merged]:
    """Combined in the coordinates of a common basis of the left side."""
    left = _left(modules, names)
    alone = iter(_right([[task] for tasks in modules for task in tasks], names=None))
    columns, concatenated = [], []
    for tasks, tall in zip(modules, left, strict=True):
        columns.append(_coordinates(tall, tasks))
        each = [(task, part, next(alone)) for task, part in zip(tasks, columns[-1], strict=True)]
        concatenated.append(torch.cat([task.scaling * part @ (_u(x) * x.s) for task, part, x in each], 1))
    products, as_, agreements = [], [], []
    for tasks, tall, parts, (w, s, _) in zip(modules, left, columns, _small_svds(concatenated), strict=True):
        w = w[:, : _directions(s)]
        pairs = [(task, (task.scaling * (w.mT @ part)).to(task.a)) for task, part in zip(tasks, parts, strict=True)]
        rows = [_without_rounding(task, x @ task.a) for task, x in pairs]
        merged, agreement = combine(rows, [task.weight for task in tasks])
        basis = tall.factored.basis_b
        out = merged.new_empty(len(basis), w.shape[1])
        products.append(Product(basis, tall.factored.t_b @ w, w.new_ones(w.shape[1]), out, flat=False, wide=True))
        as_.append(merged)
        agreements.append(agreement)
    recompose(products)
    spectra = lowrank_svd([product.out for product in products], as_, names)
    return [Merged(*pair) for pair in zip(spectra, agreements, strict=True)]


def by_tsv(modules: Sequence[Tasks], names: Sequence[str], density: float) -> list[Merged]:
    """The tasks' singular vectors made orthogonal; of each task the best, so many that all together can be."""
    tasks = [task for module in modules for task in module]
    spectra = iter(lowrank_svd([task.b for task in tasks], [task.a for task in tasks]))
    us, vhs, values = [], [], []
    for module in modules:
        kept = []
        for task in module:
            k = tsv_rank(len(task.a), min(len(task.b), task.a.shape[1]), len(module), density)
            kept.append((task, next(spectra).only(torch.arange(k))))
        us.append(torch.cat([x.u * _present(x.s).to(task.b) for task, x in kept], 1))  # where s = 0, u is any vector
        vhs.append(torch.cat([x.vh * _present(x.s).to(task.a)[:, None] for task, x in kept]))
        values.append(torch.cat([task.share * x.s for task, x in kept]))
    eyes = [torch.eye(len(x), dtype=x.dtype) for x in vhs]
    left, right = lowrank_svd(us, eyes, names), lowrank_svd(eyes, vhs, names)
    cores = [
        _present(x.s)[:, None] * (_v(x).mT @ (s[:, None] * _u(y))) * _present(y.s)
        for x, y, s in zip(left, right, values, strict=True)
    ]
    return _recomposed(left, cores, right, [None] * len(left))


def tsv_rank(r: int, side: int, tasks: int, density: float) -> int:
    """How many directions of rank r each of some tasks keeps: a share of them, and no more than fit in a side."""
    return max(1, min(side // tasks, math.ceil(round(density * r, 9))))


def by_dense(tasks: Tasks, combine: Combine) -> Combined:
    """The combined ΔW (m, n) of one module, dense."""
    return combine([(task.b @ task.a) * task.scaling for task in tasks], [task.weight for task in tasks])


def _stacked(modules: Sequence[Tasks]) -> list[Tensor]:
    return [torch.cat([task.a for task in tasks]) for tasks in modules]


def _left(modules: Sequence[Tasks], names: Sequence[str] | None) -> list[Spectrum]:
    """SVDs of [B_1 …]."""
    bs = [torch.cat([task.b for task in tasks], 1) for tasks in modules]
    return lowrank_svd(bs, [torch.eye(b.shape[1], dtype=b.dtype) for b in bs], names)


def _right(modules: Sequence[Tasks], names: Sequence[str] | None) -> list[Spectrum]:
    """SVDs of [A_1; …]."""
    as_ = _stacked(modules)
    return lowrank_svd([torch.eye(len(a), dtype=a.dtype) for a in as_], as_, names)


def _coordinates(left: Spectrum, tasks: Tasks) -> Sequence[Tensor]:
    """Uᵀ B_i (R, r_i) of each task, U the left vectors of [B_1 …]."""
    return torch.split(left.s[:, None] * _v(left).mT, [len(task.a) for task in tasks], 1)


def _without_rounding(task: Task, x: Tensor) -> Tensor:
    """Zero where x = Uᵀ ΔW_i (V) is rounding, of which an election would count the sign."""
    size = abs(task.scaling) * float(task.b.norm()) * float(task.a.norm())
    return torch.where(x.abs() > len(x) * EPS32 * size, x, 0) if size else torch.zeros_like(x)


def _u(spectrum: Spectrum) -> Tensor:
    """U, float64, where it is small."""
    return spectrum.factored.basis_b.double() @ spectrum.factored.t_b


def _v(spectrum: Spectrum) -> Tensor:
    """V, float64, where it is small."""
    return spectrum.factored.basis_a.double().mT @ spectrum.factored.t_a


def _present(s: Tensor) -> Tensor:
    """1 where a singular value is not zero, but for rounding; s descends."""
    return (s > len(s) * EPS32 * s[:1]).to(s)


def _directions(s: Tensor) -> int:
    """How many are present, one at least: the others have no entries to count, keep or drop."""
    return max(1, int(_present(s).sum()))


def _small_svds(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """U, s and Vᵀ of square matrices, those of one size together."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    sizes = [len(x) for x in matrices]
    for size in set(sizes):
        places = [i for i, n in enumerate(sizes) if n == size]
        results = batched_svd(torch.stack([matrices[i] for i in places]))
        found.update(zip(places, zip(*results, strict=True), strict=True))
    return [found[i] for i in range(len(matrices))]


def _recomposed(
    left: Sequence[Spectrum], cores: Sequence[Tensor], right: Sequence[Spectrum], agreements: Sequence[float | None]
) -> list[Merged]:
    """The spectra of U M Vᵀ, U the left vectors of `left` and V the right ones of `right`."""
    merged = []
    for tall, (p, s, qh), flat, agreement in zip(left, _small_svds(cores), right, agreements, strict=True):
        x, y = tall.factored, flat.factored
        amplification = math.sqrt(len(s)) * max(x.amplification, y.amplification)
        f = Factored(x.basis_b, x.t_b @ p, s, y.t_a @ qh.mT, y.basis_a, amplification)
        merged.append(Merged(Spectrum(f, (tall.dtypes[0], flat.dtypes[1])), agreement))
    return merged

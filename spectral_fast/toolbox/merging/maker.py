"""What a method makes of the adapters' factors of some modules: merged factors, or the singular values first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectral_fast.adapter import LoraModule
from spectral_fast.spectrum import Spectrum, rebuild
from spectral_fast.toolbox import measures
from spectral_fast.toolbox.merging import spaces
from spectral_fast.toolbox.merging.entries import Combined, combine, drawing
from spectral_fast.toolbox.merging.options import MergeOptions
from spectral_fast.toolbox.merging.spaces import Merged, Tasks

SMALL = 256  # side of a dense matrix


class Maker:
    """The method at work. Random masks come from one stream, in the order of calls.

    Args:
        options: which method, and its settings.
        scaling: of the merged modules; what is made is to be multiplied by it.
    """

    def __init__(self, options: MergeOptions, scaling: float) -> None:
        self._options, self._scaling = options, scaling
        self._draw = drawing(options.density or 1.0, torch.Generator().manual_seed(options.seed))

    def ranks(self, names: Sequence[str], modules: Sequence[Tasks]) -> list[int]:
        """The smallest rank of each module that loses no more than the options allow."""
        share = self._options.share_lost
        assert share is not None
        if self._options.how.space == "dense":
            values = [_values(spaces.by_dense(tasks, self._combine).matrix).double() for tasks in modules]
        else:
            values = [x.spectrum.s for x in self._spectra(names, modules)]
        most = [min(len(tasks[0].b), tasks[0].a.shape[1]) for tasks in modules]
        return [min(measures.rank_within(s.numpy(), share), side) for s, side in zip(values, most, strict=True)]

    def factors(
        self, names: Sequence[str], modules: Sequence[Tasks], made: Mapping[str, LoraModule]
    ) -> Iterator[tuple[Tensor, Tensor, float, float | None]]:
        """b, a, truncation error and agreement of each module.

        Args:
            names: of the modules.
            modules: what the adapters have for each.
            made: name -> merged module, whose rank and dtype are wanted.
        """
        space = self._options.how.space
        if space == "cat":
            yield from map(self._concatenated, modules)
        elif space == "factors":
            yield from map(self._of_factors, modules)
        elif space == "dense":
            for name, tasks in zip(names, modules, strict=True):
                yield self._of_dense(tasks, made[name].r)
        else:
            merged = self._spectra(names, modules)
            cut = []
            for name, x in zip(names, merged, strict=True):
                kept = x.spectrum.only(torch.arange(min(made[name].r, len(x.spectrum.s))))
                cut.append(replace(kept, dtypes=(made[name].dtype, made[name].dtype)))
            for name, (b, a), x in zip(names, rebuild(cut, [x.s for x in cut], names=names), merged, strict=True):
                error = _error(x.spectrum.s, len(a))
                none = made[name].r - len(a)  # directions that the adapters have not
                if none:
                    b, a = pad(b, (0, none)), pad(a, (0, 0, 0, none))
                yield b, a, error, x.agreement

    def _combine(self, matrices: Sequence[Tensor], weights: Sequence[float]) -> Combined:
        options = self._options
        return combine(matrices, weights, options.how, options.density or 1.0, options.majority_sign, self._draw)

    def _spectra(self, names: Sequence[str], modules: Sequence[Tasks]) -> list[Merged]:
        space = self._options.how.space
        if space == "sum":
            return spaces.by_sum(modules, names)
        if space == "tsv":
            return spaces.by_tsv(modules, names, self._options.density or 1.0)
        return (spaces.by_core if space == "core" else spaces.by_knots)(modules, names, self._combine)

    def _concatenated(self, tasks: Tasks) -> tuple[Tensor, Tensor, float, None]:
        b = torch.cat([task.b * (task.share / self._scaling) for task in tasks], 1)
        return b, torch.cat([task.a for task in tasks]), 0.0, None

    def _of_factors(self, tasks: Tasks) -> tuple[Tensor, Tensor, float, float | None]:
        """As PEFT: w s is shared between A and B by its root, its sign goes to A."""
        roots = [math.sqrt(abs(task.share)) for task in tasks]
        signed = [math.copysign(root, task.share) for root, task in zip(roots, tasks, strict=True)]
        a, of_a = self._combine([task.a for task in tasks], signed)
        b, of_b = self._combine([task.b for task in tasks], roots)
        return b, a, 0.0, None if of_a is None or of_b is None else (of_a + of_b) / 2

    def _of_dense(self, tasks: Tasks, r: int) -> tuple[Tensor, Tensor, float, float | None]:
        dense, agreement = spaces.by_dense(tasks, self._combine)
        u, s, vh = _svd(dense)
        root = s[:r].sqrt()
        return u[:, :r] * root, root[:, None] * vh[:r], _error(s, r), agreement


def _svd(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and Vᵀ; LAPACK's threads would make small matrices up to 100 times slower."""
    m, n = dense.shape
    if min(m, n) > SMALL:
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        return u, s, vh
    pair = (dense, torch.eye(n, dtype=dense.dtype)) if n <= m else (torch.eye(m, dtype=dense.dtype), dense)
    spectrum = Spectrum.of(*pair)
    return spectrum.u, spectrum.s.to(dense.dtype), spectrum.vh


def _values(dense: Tensor) -> Tensor:
    """The singular values alone."""
    return torch.linalg.svdvals(dense) if min(dense.shape) > SMALL else _svd(dense)[1]


def _error(s: Tensor, r: int) -> float:
    """‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of keeping the first r directions."""
    lost = measures.tails(s.double().numpy())
    return math.sqrt(lost[r] / lost[0]) if lost[0] else 0.0

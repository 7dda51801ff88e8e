"""What a method makes of the adapters' factors of some modules: merged factors, or the singular values first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from spectral_fast.adapter import LoraModule
from spectral_fast.spectrum import rebuild
from spectral_fast.toolbox import measures
from spectral_fast.toolbox.merging import spaces
from spectral_fast.toolbox.merging.entries import Draw, combine
from spectral_fast.toolbox.merging.options import MergeOptions
from spectral_fast.toolbox.merging.spaces import Group, Merged, Tasks

GROUP_ENTRIES = 1 << 18  # of matrices that are combined at once: some temporaries of a megabyte each
R = TypeVar("R")
Factors = tuple[Tensor, Tensor, float | None]  # b, a and the agreement


class Maker:
    """The method at work. Random masks come from one stream, in the order of calls, and of modules in a call.

    Args:
        options: which method, and its settings.
        scaling: of the merged modules; what is made is to be multiplied by it.
    """

    def __init__(self, options: MergeOptions, scaling: float) -> None:
        self._options, self._scaling = options, scaling
        self._generator = torch.Generator().manual_seed(options.seed)

    def ranks(self, names: Sequence[str], modules: Sequence[Tasks]) -> list[int]:
        """The smallest rank of each module that loses no more than the options allow."""
        share = self._options.share_lost
        assert share is not None
        values = self._in_groups(names, modules, self._values)
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
        if space in ("cat", "factors"):
            whole = self._concatenated if space == "cat" else self._of_factors
            for b, a, agreement in self._in_groups(names, modules, whole):
                yield b, a, 0.0, agreement
            return
        merged = self._in_groups(names, modules, self._merged)
        cut = []
        for name, x in zip(names, merged, strict=True):
            r = made[name].r
            kept = x.spectrum.only(torch.arange(r)) if r < len(x.spectrum.s) else x.spectrum
            cut.append(replace(kept, dtypes=(made[name].dtype, made[name].dtype)))
        for (b, a), x in zip(rebuild(cut, [x.s for x in cut], names=names), merged, strict=True):
            yield b, a, _error(x.spectrum.s, len(a)), x.agreement

    def _in_groups(
        self,
        names: Sequence[str],
        modules: Sequence[Tasks],
        work: Callable[[Group, Sequence[str], spaces.Combine], Iterable[R]],
    ) -> list[R]:
        """What `work` makes of modules of one shape together, as many as shall be in memory, in the modules' order."""
        space = self._options.how.space
        entries = [spaces.entries_of(tasks, space) for tasks in modules]
        masks = [self._masks(tasks, count) for tasks, count in zip(modules, entries, strict=True)]
        groups: dict[object, list[int]] = {}
        for i, tasks in enumerate(modules):
            groups.setdefault(spaces.shape_of(tasks), []).append(i)
        found: dict[int, R] = {}
        for same in groups.values():
            most = max(1, GROUP_ENTRIES // entries[same[0]])
            for places in (same[i : i + most] for i in range(0, len(same), most)):
                draw = _dealing([masks[i] for i in places])
                results = work(Group.of([modules[i] for i in places]), [names[i] for i in places], self._combine(draw))
                found.update(zip(places, results, strict=True))
        return [found[i] for i in range(len(modules))]

    def _masks(self, tasks: Tasks, count: int) -> Tensor:
        """Of all entries of a module, as PEFT draws them from a generator in the same state; none without drawings."""
        density = self._options.density
        if self._options.how.sparsify != "random" or density == 1:
            count = 0
        wide = torch.float64 if any(task.b.dtype == torch.float64 for task in tasks) else torch.float32
        chances = torch.tensor(density or 1.0, dtype=wide)  # in this dtype: its draws take as many random bits
        return torch.empty(count, dtype=torch.bool).bernoulli_(chances, generator=self._generator)

    def _combine(self, draw: Draw) -> spaces.Combine:
        options = self._options
        how, density, sign = options.how, options.density or 1.0, options.majority_sign
        return partial(combine, how=how, density=density, sign=sign, draw=draw)

    def _values(self, group: Group, names: Sequence[str], combine: spaces.Combine) -> list[Tensor]:
        if self._options.how.space == "dense":
            return spaces.dense_values(group, names, combine)
        return [x.spectrum.s for x in self._merged(group, names, combine)]

    def _merged(self, group: Group, names: Sequence[str], combine: spaces.Combine) -> list[Merged]:
        space = self._options.how.space
        if space == "sum":
            return spaces.by_sum(group, names)
        if space == "tsv":
            return spaces.by_tsv(group, names, self._options.density or 1.0)
        by = {"core": spaces.by_core, "knots": spaces.by_knots, "dense": spaces.by_dense}[space]
        return by(group, names, combine)

    def _concatenated(self, group: Group, names: Sequence[str], _: spaces.Combine) -> Iterable[Factors]:
        b = torch.cat([b * x.to(b) for b, x in zip(group.bs, group.shares / self._scaling, strict=True)], 2)
        return zip(b, torch.cat(group.as_, 1), [None] * len(names), strict=True)

    def _of_factors(self, group: Group, _: Sequence[str], combine: spaces.Combine) -> Iterable[Factors]:
        """As PEFT: w s is shared between A and B by its root, its sign goes to A."""
        roots = group.shares.abs().sqrt()
        a, of_a = combine(group.as_, roots.copysign(group.shares), None)
        b, of_b = combine(group.bs, roots, None)
        each = zip(of_a, of_b, strict=True)
        return zip(b, a, [None if x is None or y is None else (x + y) / 2 for x, y in each], strict=True)


def _dealing(masks: Sequence[Tensor]) -> Draw:
    """Hands out the masks of some modules, (entries,) each, matrix by matrix."""
    stacked, dealt = torch.stack(list(masks)), 0

    def draw(x: Tensor) -> Tensor:
        nonlocal dealt
        begin, dealt = dealt, dealt + x[0].numel()
        return stacked[:, begin:dealt].reshape(x.shape)

    return draw


def _error(s: Tensor, r: int) -> float:
    """‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of keeping the first r directions."""
    lost = measures.tails(s.double().numpy())
    return math.sqrt(lost[r] / lost[0]) if lost[0] else 0.0

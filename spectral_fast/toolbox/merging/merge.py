"""Merging, file to file: read a few modules of all adapters, combine them, write them, and so on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.adapter.creation import check_out_dir, creating
from spectral_fast.adapter.patterns import MANY
from spectral_fast.backends import chosen_backends
from spectral_fast.pipeline import one_thread_each
from spectral_fast.provenance import versions
from spectral_fast.toolbox.merging.maker import Maker
from spectral_fast.toolbox.merging.options import MergeOptions
from spectral_fast.toolbox.merging.plan import Plan, in_model_order
from spectral_fast.toolbox.merging.spaces import Task, Tasks
from spectral_fast.toolbox.streaming import in_batches

META = "merge_meta.json"
BATCH_BYTES = 1 << 20  # of factors that are read together: hundreds of tiny modules, as calls cost more than their work
R = TypeVar("R")
Names = list[str]
Progress = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class MergedModule:
    """What happened to one module.

    Attributes:
        sources: the numbers of the adapters that have it.
        r: its rank.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of truncating the merged ΔW to that rank, rounding to the stored dtype apart.
        agreement: share of the entries left by sparsification that have the elected sign; None without an election.
    """

    sources: list[int]
    r: int
    error: float
    agreement: float | None


def merge_adapters(
    sources: Sequence[Adapter],
    weights: Sequence[float],
    options: MergeOptions,
    out_dir: Path | str,
    *,
    modules: Sequence[Sequence[LoraModule]] | None = None,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
    warn: Callable[[list[str]], object] = lambda _: None,
) -> dict[str, MergedModule]:
    """Write one adapter that stands for Σ w_i ΔW_i, or for what `options` makes of the ΔW_i = s_i B_i A_i.

    A module that only some adapters have is merged of those: it is zero in the others. The result has scaling 1 (but
    see `Plan.scaling`), the first adapter's configuration, and `merge_meta.json`. It appears at once when complete, or
    not at all. Modules are read once, and twice where ranks follow from singular values. A few small modules are in
    memory, or one large one; as a dense matrix for the `…_svd` methods but svd, and never otherwise.

    Args:
        sources: the adapters, opened; they are never touched.
        weights: w of each, not zero.
        options: the method and its settings.
        out_dir: folder to write, which must not hold anything unless `overwrite`.
        modules: of each adapter, what to merge; by default every module that can be edited. Others are left out.
        meta: more entries for the "meta" part of `merge_meta.json`.
        overwrite: replace an adapter that is in `out_dir`.
        progress: wraps the list of names.
        warn: is told, before the work begins, what to know of adapters that differ.

    Returns:
        module name -> what happened to it.

    Raises:
        ValueError: numbers of adapters and weights differ, adapters do not fit together (see `Plan`), or a value is
            not finite.
        FileExistsError: out_dir holds something and `overwrite` is false.

    Example:
        >>> from spectral_fast import Adapter, embedded
        >>> from spectral_fast.toolbox import MergeOptions, merge_adapters
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> merged = merge_adapters([adapter, adapter], [0.5, 0.5], MergeOptions(method="svd", rank=32), "merged")
        >>> max(module.error for module in merged.values()) < 1e-6  # of rank 64, half is the same again
        True
    """
    check_out_dir(out_dir, [source.path for source in sources], overwrite=overwrite)
    _check_weights(sources, weights)
    plan = Plan.of(sources, modules or [list(source.modules.values()) for source in sources])
    _check_shares(sources, plan, weights)
    warn(plan.warnings)
    ranks = plan.ranks(options)
    scaling = plan.scaling(weights, options)
    stream = _Stream(sources, plan, weights, options, scaling)
    if options.share_lost is not None:
        with stream.each(Maker.ranks, progress) as results:
            ranks = dict(zip(stream.names, (rank for batch in results for rank in batch), strict=True))
    made = plan.modules(ranks, scaling, options.dtype)
    config = plan.config(sources, made)
    if len(patterns := config.get("rank_pattern") or {}) > MANY:
        warn([f"PEFT tries each of {len(patterns)} patterns on every module, for minutes to hours; --rank needs none"])
    merged: dict[str, MergedModule] = {}

    def write(maker: Maker, names: Names, modules: Sequence[Tasks]) -> list[tuple[str, MergedModule]]:
        done = []
        for name, (b, a, error, agreement) in zip(names, maker.factors(names, modules, made), strict=True):
            put(name, *(_in_dtype(made[name].dtype, x, name) for x in (b, a)))
            parts = [part.source for part in plan.parts[name]]
            done.append((name, MergedModule(parts, made[name].r, error, agreement)))
        return done

    def record() -> bytes:
        content = {
            "meta": {
                "sources": [
                    {"lora_path": str(source.path), "adapter_sha256": fingerprint(), "weight": weight}
                    for source, fingerprint, weight in zip(sources, fingerprints, weights, strict=True)
                ],
                **asdict(options),
                **(meta or {}),
                "versions": versions(),
                "backends": chosen_backends(),
            },
            "modules": {name: asdict(module) for name, module in merged.items()},
        }
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()

    with ExitStack() as stack:
        fingerprints = [stack.enter_context(source.fingerprint_meanwhile({})) for source in sources]
        put = stack.enter_context(
            creating(
                out_dir,
                config,
                made.values(),
                {META: record},
                shapes=plan.stored_shapes(made),
                others=plan.others,
                sources=[source.path for source in sources],
                overwrite=overwrite,
            )
        )
        for batch in stack.enter_context(stream.each(write, progress)):
            merged.update(batch)
    return merged


def _check_weights(sources: Sequence[Adapter], weights: Sequence[float]) -> None:
    if len(sources) != len(weights) or not sources:
        raise ValueError(f"one weight per adapter, and one adapter at least; got {len(sources)} and {len(weights)}")
    bad = [weight for weight in weights if not math.isfinite(weight) or weight == 0]
    if bad:
        raise ValueError(f"weights must be finite and not zero (leave the adapter out instead); got {bad[0]}")


def _check_shares(sources: Sequence[Adapter], plan: Plan, weights: Sequence[float]) -> None:
    for name, found in plan.parts.items():
        for part in found:
            weight, scaling = weights[part.source], part.module.scaling
            if scaling and not 1e-30 < abs(weight * scaling) < 1e30:
                raise ValueError(
                    f"weight times scaling must be between 1e-30 and 1e30, for the sake of float32; it is {weight:g} "
                    f"times {scaling:g} for {name} of {sources[part.source].path}"
                )


def _in_dtype(dtype: torch.dtype, factor: Tensor, name: str) -> Tensor:
    """The factor as it will be stored, if float16, whose range is narrow, has room for it."""
    stored = factor.to(dtype)
    if stored.dtype == torch.float16 != factor.dtype:
        lost = float((stored.to(factor) - factor).norm())
        if not lost <= 0.01 * float(factor.norm()):
            raise ValueError(
                f"{name}: merged factors are between {float(factor.abs().min()):.3g} and "
                f"{float(factor.abs().max()):.3g}, beyond float16 (6e-8 to 65504): give dtype float32"
            )
    return stored


class _Stream:
    """The modules of all adapters, a batch of small ones or one large one at a time."""

    def __init__(
        self, sources: Sequence[Adapter], plan: Plan, weights: Sequence[float], options: MergeOptions, scaling: float
    ) -> None:
        self._sources, self._plan, self._weights = sources, plan, weights
        self._options, self._scaling = options, scaling
        self.names = sorted(plan.parts, key=in_model_order)
        dense = options.how.space == "dense"  # then this is what memory is for, however small the factors
        self._sizes = {
            name: sum(
                max(sources[part.source].size_of(part.module), part.module.m * part.module.n * dense) for part in found
            )
            for name, found in plan.parts.items()
        }

    @contextmanager
    def each(self, work: Callable[[Maker, Names, Sequence[Tasks]], R], progress: Progress) -> Iterator[Iterator[R]]:
        """Give an iterator over work(maker, names, tasks) for all modules in order, several in threads.

        One thread where random masks are drawn one after the other, or where a module takes a dense matrix.
        """
        how = self._options.how
        maker = Maker(self._options, self._scaling)
        alone = how.sparsify == "random" or how.space == "dense"
        size_of, job = self._sizes.__getitem__, partial(work, maker)
        with (
            nullcontext(1) if alone else one_thread_each() as threads,
            in_batches(self.names, size_of, self._tasks, job, progress, threads, BATCH_BYTES) as results,
        ):
            yield results

    def _tasks(self, name: str, memory: Tensor) -> list[Task]:
        tasks, begin = [], 0
        for part in self._plan.parts[name]:
            source = self._sources[part.source]
            b, a = source.read(part.module, memory[begin:])
            tasks.append(Task(b, a, self._weights[part.source], part.module, source.path))
            begin += source.size_of(part.module)
        return tasks

"""Another rank for an adapter: the best directions of each module, by singular value or by sensitivity.

ΔW_k = Σ_{i<k} s_i u_i v_iᵀ is the nearest matrix of rank k, ‖ΔW − ΔW_k‖_F² = Σ_{i≥k} s_i² (Eckart and Young, 1936);
its factors come from B and A alone (`spectral_fast.spectrum`). To first order direction i is worth s_i ∂L/∂s_i of loss,
so with sensitivities those with the least |s g| go first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.backends import chosen_backends
from spectral_fast.edit import Measured
from spectral_fast.kernels.lowrank_svd import singular_values
from spectral_fast.provenance import versions
from spectral_fast.sensitivity import Sensitivity
from spectral_fast.spectrum import Spectrum, lowrank_svd, rebuild
from spectral_fast.toolbox import measures
from spectral_fast.toolbox.options import ResizeOptions
from spectral_fast.toolbox.streaming import Batch, Factors, Progress, streamed

META = "resize_meta.json"
Kept = Mapping[str, Tensor | int]  # module -> indices of directions, ascending, or how many of the largest


@dataclass(frozen=True)
class ResizedModule:
    """What happened to one module.

    Attributes:
        r: its rank before.
        kept: how many directions it has now; zeros that pad them are not counted.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of leaving the others out, rounding to the stored dtype apart.
        directions: which they are, if sensitivities chose them.
    """

    r: int
    kept: int
    error: float
    directions: list[int] | None = None


def resize_adapter(
    adapter: Adapter,
    options: ResizeOptions,
    out_dir: Path | str,
    *,
    modules: Sequence[LoraModule] | None = None,
    sensitivity: Sensitivity | None = None,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> dict[str, ResizedModule]:
    """Write a copy of an adapter with other ranks: B' = U_k diag(√s_k), A' = diag(√s_k) V_kᵀ.

    rank_pattern and alpha_pattern tell of ranks that differ; every scaling stays. Modules that keep all directions are
    copied byte for byte, or padded with zeros. The copy has the source's format, dtypes and other files, DoRA
    magnitudes included, and `resize_meta.json`. It appears at once when complete, or not at all. Modules are read once,
    and twice for `energy` and `error`, whose ranks are known only when all spectra are.

    Args:
        adapter: the adapter, opened; it is never touched.
        options: the goal, and whether to pad.
        out_dir: folder to write, which must not hold anything unless `overwrite`.
        modules: what to resize; by default every module that can be edited. `pad` pads the others, too.
        sensitivity: chooses by |s g| instead of s; needed for budgets.
        meta: more entries for the "meta" part of `resize_meta.json`.
        overwrite: replace an adapter that is in `out_dir`.
        progress: wraps the list of modules.

    Returns:
        module name -> what happened to it, in the order of `modules`.

    Raises:
        ValueError: the rank cannot change (see `Adapter.config_with`), a value is not finite, sensitivities are
            another adapter's or lack a module, or a budget is below one direction per module.
        FileExistsError: out_dir holds something and `overwrite` is false.

    Example:
        >>> from spectral_fast import Adapter, embedded
        >>> from spectral_fast.toolbox import ResizeOptions, resize_adapter
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> resized = resize_adapter(adapter, ResizeOptions(energy=0.9), "small")
        >>> module = resized["base_model.model.model.layers.0.mlp.down_proj"]
        >>> module.r, module.kept, module.error < 0.1**0.5  # the error of leaving out 10 % of the energy
        (32, 6, True)
    """
    chosen = list(adapter.modules.values()) if modules is None else list(modules)
    options.check_sensitivity(sensitivity)
    adapter.check_out_dir(out_dir, overwrite=overwrite)
    adapter.config_with({})  # before the spectra: whether ranks can change at all
    resized: dict[str, ResizedModule] = {}
    with ExitStack() as stack:
        fingerprint = stack.enter_context(adapter.fingerprint_meanwhile(sensitivity.record if sensitivity else {}))
        measured = None
        if sensitivity is not None:
            measured = Measured(adapter, sensitivity, fingerprint)
            measured.check_covers(chosen)
            for module in chosen:
                if len(found := sensitivity.modules[module.name].s) != module.r:
                    measured.check_adapter()
                    raise ValueError(f"{module.name}: the sensitivities are of rank {len(found)}, not {module.r}")
        kept = _kept(adapter, chosen, options, sensitivity, progress)
        ranks = {name: module.r for name, module in adapter.modules.items()}
        ranks |= {name: k if isinstance(k, int) else len(k) for name, k in kept.items()}
        if options.pad:
            ranks = dict.fromkeys(ranks, max([*ranks.values(), options.rank or 1]))
        ranks = {name: r for name, r in ranks.items() if r != adapter.modules[name].r or name in kept}
        touched = [module for name, module in adapter.modules.items() if name in ranks]

        def resize(batch: Batch, factors: Factors) -> list[tuple[str, ResizedModule]]:
            cut = [i for i, module in enumerate(batch) if module.name in kept]
            names = [batch[i].name for i in cut]
            spectra = dict(zip(cut, lowrank_svd(*_columns(factors, cut), names), strict=True))
            smaller = {i: spectrum.only(_indices(kept[batch[i].name])) for i, spectrum in spectra.items()}
            made = rebuild(list(smaller.values()), [x.s for x in smaller.values()], names=names)
            new = dict(zip(cut, made, strict=True))
            done = []
            for i, (module, pair) in enumerate(zip(batch, factors, strict=True)):
                put(module, *_padded(*new.get(i, pair), ranks[module.name]))
                if i in spectra:
                    done.append((module.name, _result(module, spectra[i], kept[module.name], measured)))
            return done

        def record() -> bytes:
            if measured is not None:
                measured.check_adapter()
            content = {
                "meta": {
                    "lora_path": str(adapter.path),
                    "adapter_sha256": fingerprint(),
                    **asdict(options),
                    **(meta or {}),
                    "versions": versions(),
                    "backends": chosen_backends(),
                    "probe": dict(sensitivity.record) if sensitivity is not None else None,
                },
                "modules": {name: asdict(module) for name, module in resized.items()},
            }
            return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()

        put = stack.enter_context(adapter.rewriting(out_dir, {META: record}, ranks=ranks, overwrite=overwrite))
        resized |= {module.name: ResizedModule(module.r, module.r, 0.0) for module in chosen}
        for done in stack.enter_context(streamed(adapter, touched, resize, progress)):
            resized.update(done)
    return resized


def _kept(
    adapter: Adapter,
    modules: Sequence[LoraModule],
    options: ResizeOptions,
    sensitivity: Sensitivity | None,
    progress: Progress,
) -> Kept:
    """Of the modules that lose directions: which ones stay."""
    kept: dict[str, Tensor | int]
    if sensitivity is not None:
        kept = dict(_most_worth(modules, options, sensitivity))
    elif options.rank is not None:
        kept = {module.name: options.rank for module in modules}
    else:
        share = options.error**2 if options.error is not None else 1 - (options.energy or 0)

        def solve(batch: Batch, factors: Factors) -> list[tuple[str, int]]:
            names = [module.name for module in batch]
            values = singular_values(*_columns(factors, range(len(batch))), names)
            return [(name, measures.rank_within(s.numpy(), share)) for name, s in zip(names, values, strict=True)]

        with streamed(adapter, modules, solve, progress) as results:
            kept = {name: k for batch in results for name, k in batch}
    return {
        module.name: k
        for module in modules
        for k in [kept[module.name]]
        if (k if isinstance(k, int) else len(k)) < module.r
    }


def _most_worth(
    modules: Sequence[LoraModule], options: ResizeOptions, sensitivity: Sensitivity
) -> Mapping[str, Tensor]:
    """The directions of each module with the largest |s g|: so many of each, or as a budget over all allows."""
    worth = [(x.s * x.g).abs().numpy() for x in (sensitivity.modules[module.name] for module in modules)]
    if options.rank is not None:
        keep = [_largest(x, options.rank) for x in worth]
    else:
        order = np.argsort(np.concatenate(worth), kind="stable")
        best = np.cumsum([0, *map(len, worth)])[:-1] + [int(x.argmax()) for x in worth]
        order = order[~np.isin(order, best)]  # a module without a direction is none to PEFT
        costs = np.repeat([module.m + module.n for module in modules], list(map(len, worth)))
        dropped = order[: _how_many(np.concatenate(worth), costs, order, options)]
        stays = np.ones(len(costs), dtype=bool)
        stays[dropped] = False
        keep = np.split(stays, np.cumsum([len(x) for x in worth])[:-1])
    return {module.name: torch.from_numpy(x.nonzero()[0]) for module, x in zip(modules, keep, strict=True)}


def _largest(x: measures.Floats, count: int) -> Any:
    mask = np.zeros(len(x), dtype=bool)
    mask[np.argsort(-x, kind="stable")[:count]] = True
    return mask


def _how_many(worth: measures.Floats, costs: Any, order: Any, options: ResizeOptions) -> int:
    """How many directions, the first in `order`, are dropped."""
    if options.budget is not None:
        return int((np.cumsum(worth[order]) <= options.budget * worth.sum()).sum())
    assert options.budget_params is not None
    left = costs.sum() - np.append(0, np.cumsum(costs[order]))
    if left[-1] > options.budget_params:
        raise ValueError(
            f"budget_params {options.budget_params:,} is less than one direction in every module takes, {left[-1]:,}; "
            "give more, or select fewer modules"
        )
    return int(np.argmax(left <= options.budget_params))


def _result(module: LoraModule, spectrum: Spectrum, kept: Tensor | int, measured: Measured | None) -> ResizedModule:
    if measured is not None:
        measured.g(module, spectrum.s)  # that these are the directions that were measured
    s = spectrum.s.numpy()
    lost = s[kept:] if isinstance(kept, int) else np.delete(s, kept.numpy())
    total = float(s @ s)
    error = math.sqrt(float(lost @ lost) / total) if total else 0.0
    directions = None if isinstance(kept, int) else kept.tolist()
    return ResizedModule(module.r, len(s) - len(lost), error, directions)


def _indices(kept: Tensor | int) -> Tensor:
    return torch.arange(kept) if isinstance(kept, int) else kept


def _columns(factors: Factors, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    return [factors[i][0] for i in chosen], [factors[i][1] for i in chosen]


def _padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    zeros = rank - len(a)
    return (pad(b, (0, zeros)), pad(a, (0, 0, 0, zeros))) if zeros else (b, a)

"""An adapter for loaders that know one rank and one scaling: alpha == r everywhere, no patterns.

Loaders other than PEFT drop rank_pattern, alpha_pattern and use_rslora and scale every module by one lora_alpha / r.
Here each module's scaling goes into a factor, and all get one rank by zeros, so that any loader comes to the same ΔW.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectral_fast.adapter import Adapter
from spectral_fast.provenance import versions
from spectral_fast.toolbox.streaming import Batch, Factors, Progress, streamed

META = "export_meta.json"


@dataclass(frozen=True)
class BakedModule:
    """What happened to one module.

    Attributes:
        r: its rank before it was padded.
        scaling: what is in its factors now.
        factor: "B" or "A", which one took it; None where it was 1.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F, by rounding that factor to its dtype; 0 for powers of two, but for numbers that
            leave the dtype's range.
    """

    r: int
    scaling: float
    factor: str | None
    error: float


def export_adapter(
    adapter: Adapter,
    out_dir: Path | str,
    *,
    rank: int | None = None,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> dict[str, BakedModule]:
    """Write a copy of an adapter with lora_alpha == r, one rank, no patterns, no rsLoRA, and the same ΔW.

    The copy has the source's format, dtypes and other files, DoRA magnitudes included, and `export_meta.json`. It
    appears at once when complete, or not at all.

    Args:
        adapter: opened with include_conv and include_embedding, if it has such modules; it is never touched.
        out_dir: folder to write, which must not hold anything unless `overwrite`.
        rank: the rank of all modules; by default the largest there is.
        meta: more entries for the "meta" part of `export_meta.json`.
        overwrite: replace an adapter that is in `out_dir`.
        progress: wraps the list of modules.

    Returns:
        module name -> what happened to it.

    Raises:
        ValueError: the adapter has factors that cannot be rewritten, a bias that is scaled too, or an init by which
            PEFT changes the base weights; a module's rank is above `rank`; or a factor is not finite.
        FileExistsError: out_dir holds something and `overwrite` is false.

    Example:
        >>> from spectral_fast import Adapter, embedded
        >>> from spectral_fast.toolbox import export_adapter
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> baked = export_adapter(adapter, "plain", rank=64)  # for a loader that knows rank 64 only
        >>> plain = Adapter.open("plain")
        >>> plain.config["r"], plain.config["lora_alpha"], max(module.error for module in baked.values())
        (64, 64, 0.0)
    """
    modules = list(adapter.modules.values())
    config = _config(adapter, rank)
    ranks = {module.name: config["r"] for module in modules}
    baked: dict[str, BakedModule] = {}

    def bake(batch: Batch, factors: Factors) -> list[tuple[str, BakedModule]]:
        done = []
        for module, (b, a) in zip(batch, factors, strict=True):
            new_b, new_a, factor, error = _baked(b, a, module.scaling)
            zeros = config["r"] - module.r
            put(module, pad(new_b, (0, zeros)), pad(new_a, (0, 0, 0, zeros)))
            done.append((module.name, BakedModule(module.r, module.scaling, factor, error)))
        return done

    def record() -> bytes:
        content = {
            "meta": {
                "lora_path": str(adapter.path),
                "adapter_sha256": fingerprint(),
                "rank": config["r"],
                **(meta or {}),
                "versions": versions(),
            },
            "modules": {name: asdict(module) for name, module in baked.items()},
        }
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()

    with (
        adapter.fingerprint_meanwhile({}) as fingerprint,
        adapter.rewriting(out_dir, {META: record}, ranks=ranks, config=config, overwrite=overwrite) as put,
        streamed(adapter, modules, bake, progress) as results,
    ):
        for done in results:
            baked.update(done)
    return baked


def _config(adapter: Adapter, rank: int | None) -> dict[str, Any]:
    """The copy's adapter_config.json; refuses what it could not be true of."""
    if adapter.carried_modules:
        name = adapter.carried_modules[0]
        raise ValueError(
            f"{adapter.path}: the scaling cannot be put into all factors: {name} ({adapter.carried[name]})"
        )
    if not adapter.modules:
        raise ValueError(f"{adapter.weights.path} has no LoRA factors to put a scaling into; is it the right adapter?")
    largest = max(module.r for module in adapter.modules.values())
    if rank is not None and rank < largest:
        raise ValueError(f"rank must be at least the largest there is, {largest}; got {rank}: resize first")
    rank = rank or largest
    config = adapter.config_with(dict.fromkeys(adapter.modules, rank))
    for key, why in adapter.carried.items():
        if why.startswith("bias of a LoRA factor"):
            scaling = adapter.modules[key.rpartition(".lora_")[0]].scaling
            if scaling != 1:
                raise ValueError(f"{key} is scaled by {scaling:g} with its module (lora_bias), and would not be")
    return config | {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}


def _baked(b: Tensor, a: Tensor, scaling: float) -> tuple[Tensor, Tensor, str | None, float]:
    """The factors of scaling · B A, which of them changed, and the relative error of rounding it."""
    if scaling == 1:
        return b, a, None, 0.0
    wide_b, wide_a = b.double(), a.double()
    grams = wide_b.mT @ wide_b, wide_a @ wide_a.mT
    total = float((grams[0] * grams[1]).sum()) * scaling**2
    found = []
    for name, x, wide, other in (("B", b, wide_b, grams[1]), ("A", a, wide_a, grams[0])):
        new = (wide * scaling).to(x.dtype)
        lost = new.double() - wide * scaling
        if not lost.any():
            return (new, a, name, 0.0) if name == "B" else (b, new, name, 0.0)
        gram = lost.mT @ lost if name == "B" else lost @ lost.mT
        squared = float((gram * other).sum())
        found.append(((max(squared, 0.0) / total) ** 0.5 if total else 0.0, name, new))
    # NaN, where a value left the range, is never the smaller one.
    error, name, new = min(found, key=lambda x: x[0] if torch.isfinite(x[2]).all() else torch.inf)
    return (new, a, name, error) if name == "B" else (b, new, name, error)

"""Spikes of an adapter's spectra, clipped: singular values far above the others of their module.

Where many adapters are added up, a few directions of one can drown all others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.adapter.naming import changes_base
from spectral_fast.backends import chosen_backends
from spectral_fast.provenance import versions
from spectral_fast.spectrum import lowrank_svd, rebuild
from spectral_fast.toolbox import measures
from spectral_fast.toolbox.options import ClipOptions
from spectral_fast.toolbox.streaming import Batch, Factors, Progress, streamed

META = "clip_meta.json"


@dataclass(frozen=True)
class ClippedModule:
    """What happened to one module.

    Attributes:
        limit: what its singular values (of B A, without the scaling) were clipped to; infinite where all are zero.
        clipped: those above it, as they were.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F, rounding to the stored dtype apart.
    """

    limit: float
    clipped: list[float]
    error: float


def clip_adapter(
    adapter: Adapter,
    options: ClipOptions,
    out_dir: Path | str,
    *,
    modules: Sequence[LoraModule] | None = None,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> dict[str, ClippedModule]:
    """Write a copy of an adapter with s' = min(s, multiple · median of the s that are not zero), module by module.

    Modules without such spikes are copied byte for byte. The copy has the source's ranks, format, dtypes and other
    files, DoRA magnitudes included, and `clip_meta.json`. It appears at once when complete, or not at all.

    Args:
        adapter: the adapter, opened; it is never touched.
        options: what a spike is.
        out_dir: folder to write, which must not hold anything unless `overwrite`.
        modules: what to clip; by default every module that can be edited.
        meta: more entries for the "meta" part of `clip_meta.json`.
        overwrite: replace an adapter that is in `out_dir`.
        progress: wraps the list of modules.

    Returns:
        module name -> what happened to it, in the order of `modules`.

    Raises:
        ValueError: factors that are not finite, named; or an init by which PEFT changes the base weights.
        FileExistsError: out_dir holds something and `overwrite` is false.

    Example:
        >>> from spectral_fast import Adapter, embedded
        >>> from spectral_fast.toolbox import ClipOptions, clip_adapter
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> clipped = clip_adapter(adapter, ClipOptions(multiple=10), "clipped")
        >>> module = clipped["base_model.model.model.layers.0.mlp.down_proj"]
        >>> len(module.clipped), round(module.limit, 2), round(module.error, 2)
        (1, 1.7, 0.23)
    """
    if changes_base(adapter.config):
        raise ValueError(
            f"init_lora_weights={adapter.config['init_lora_weights']}: the factors hold directions that PEFT takes out "
            "of the base weights on loading, so their spikes are the base's; convert the adapter to plain LoRA first"
        )
    chosen = list(adapter.modules.values()) if modules is None else list(modules)
    clipped: dict[str, ClippedModule] = {}

    def clip(batch: Batch, factors: Factors) -> list[tuple[str, ClippedModule]]:
        names = [module.name for module in batch]
        bs, as_ = map(list, zip(*factors, strict=True))
        done, spiked = [], []
        for i, spectrum in enumerate(lowrank_svd(bs, as_, names)):
            s = spectrum.s.numpy()
            limit = measures.spike_limit(s, options.multiple)
            cut = s[s > limit]
            if len(cut):
                spiked.append((i, spectrum, spectrum.s.clamp(max=limit)))
            error = float((((cut - limit) ** 2).sum() / (s**2).sum()) ** 0.5) if len(cut) else 0.0
            done.append((names[i], ClippedModule(limit, cut.tolist(), error)))
        if spiked:
            where, spectra, s_new = zip(*spiked, strict=True)
            out = [factors[i] for i in where]
            for i, (b, a) in zip(where, rebuild(spectra, s_new, out, [names[i] for i in where]), strict=True):
                put(batch[i], b, a)
        return done

    def record() -> bytes:
        content = {
            "meta": {
                "lora_path": str(adapter.path),
                "adapter_sha256": fingerprint(),
                **asdict(options),
                **(meta or {}),
                "versions": versions(),
                "backends": chosen_backends(),
            },
            "modules": {name: asdict(module) for name, module in clipped.items() if module.clipped},
        }
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()

    with (
        adapter.fingerprint_meanwhile({}) as fingerprint,
        adapter.rewriting(out_dir, {META: record}, overwrite=overwrite) as put,
        streamed(adapter, chosen, clip, progress) as results,
    ):
        for done in results:
            clipped.update(done)
    return clipped

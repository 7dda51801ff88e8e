"""Rank channels of LoRA: how much each term of ΔW = Σ b_k a_k matters, and an adapter without the least of them.

A channel is a column of B with its row of A, as they are stored. In an adapter that `edit` wrote they are the singular
directions: pruning by sensitivity is `edit` with sup_factor 0, after which `prune` leaves out what is zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.pipeline import in_order
from spectral_fast.provenance import versions
from spectral_fast.toolbox.measures import channel_energy
from spectral_fast.toolbox.options import PruneOptions

META = "channel_prune_meta.json"
Progress = Callable[[Sequence[LoraModule]], Iterable[LoraModule]]


@dataclass(frozen=True)
class PrunedModule:
    """What happened to one module: which channels were kept, and the energy of each, (r,)."""

    kept: Tensor
    energy: Tensor

    @property
    def energy_kept(self) -> float:
        """Share of Σ ‖b_k a_k‖² that the kept channels have."""
        total = self.energy.sum().item()
        return 1.0 - self.energy[~self.kept].sum().item() / total if total else 1.0


def prune_adapter(
    adapter: Adapter,
    options: PruneOptions,
    out_dir: Path | str,
    *,
    modules: Sequence[LoraModule] | None = None,
    compact: bool = False,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> dict[str, PrunedModule]:
    """Write a copy of an adapter in which every module has its best channels only.

    The other channels are zero in B and A or, with `compact`, left out: the module then has a smaller rank, of which
    adapter_config.json tells (rank_pattern), with the same scaling (alpha_pattern). Both copies stand for the same ΔW.
    The copy has the source's format, dtypes and other files, DoRA magnitudes included, and `channel_prune_meta.json`.
    It appears at once when complete, or not at all.

    Args:
        adapter: the adapter, opened; it is never touched.
        options: score and share of the channels.
        out_dir: folder to write, which must not hold anything unless `overwrite`.
        modules: what to prune; by default every module that can be edited.
        compact: make the rank smaller instead of zeroing channels.
        meta: more entries for the "meta" part of `channel_prune_meta.json`.
        overwrite: replace an adapter that is in `out_dir`.
        progress: wraps the list of modules.

    Returns:
        module name -> what happened to it, in the order of `modules`.

    Raises:
        ValueError: factors that are not finite, named; or `compact` where the rank cannot change: PiSSA and other inits
            that change the base weights by r, several adapters in one file, or patterns that cannot tell modules apart.
        FileExistsError: out_dir holds something and `overwrite` is false.

    Source: the channel scores are those of SparseLoRA-inspired pruning studies; see `spectral_fast.study`.

    Example:
        >>> from spectral_fast import Adapter, embedded
        >>> from spectral_fast.toolbox import PruneOptions, prune_adapter
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> pruned = prune_adapter(adapter, PruneOptions(keep_ratio=0.5), "pruned", compact=True)
        >>> module = pruned["base_model.model.model.layers.0.self_attn.o_proj"]
        >>> int(module.kept.sum()), module.energy_kept > 0.5
        (16, True)
        >>> {module.r for module in Adapter.open("pruned").modules.values()}
        {16}
    """
    chosen = list(adapter.modules.values()) if modules is None else list(modules)
    ranks = {module.name: options.keep(module.r) for module in chosen} if compact else {}
    ranks = {name: r for name, r in ranks.items() if r != adapter.modules[name].r}
    score = options.scorer()
    draws: dict[str, Tensor] = {}
    if options.method == "random":  # in order, which threads do not keep
        draws = {module.name: score(torch.empty(0, module.r), torch.empty(module.r, 0)) for module in chosen}
    pruned: dict[str, PrunedModule] = {}

    def prune(module: LoraModule, memory: Tensor) -> tuple[str, PrunedModule]:
        b, a = adapter.read(module, memory)
        energy = channel_energy(b, a)
        if not energy.isfinite().all():  # also in a channel that is to go: its score means nothing
            raise ValueError(f"{module.b_key} or its lora_A has NaN or infinite values: mend the adapter first")
        kept = options.kept(draws[module.name] if draws else score(b, a))
        if module.name in ranks:
            put(module, b[:, kept], a[kept])
        else:
            b[:, ~kept] = 0
            a[~kept] = 0
            put(module, b, a)
        return module.name, PrunedModule(kept, energy)

    def record() -> bytes:
        content = {
            "meta": {
                "lora_path": str(adapter.path),
                "adapter_sha256": fingerprint(),
                **asdict(options),
                "compact": compact,
                **(meta or {}),
                "versions": versions(),
            },
            "modules": {
                name: {
                    "r": len(module.kept),
                    "kept": module.kept.nonzero().squeeze(1).tolist(),
                    "energy_kept": module.energy_kept,
                }
                for name, module in pruned.items()
            },
        }
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()

    threads = torch.get_num_threads()
    slots = [adapter.memory_for(chosen) for _ in range(threads + 1)]
    with (
        adapter.fingerprint_meanwhile({}) as fingerprint,
        adapter.rewriting(out_dir, {META: record}, ranks=ranks, overwrite=overwrite) as put,
        in_order(prune, progress(chosen), slots, threads) as results,
    ):
        pruned.update(results)
    return pruned

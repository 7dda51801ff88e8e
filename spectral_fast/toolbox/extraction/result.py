"""What an extraction found, sorted, and the adapter that is written of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_fast.adapter.creation import Other, creating, new_config, plain_module
from spectral_fast.calibration.model import PEFT_PREFIX
from spectral_fast.toolbox.extraction.checkpoints import Checkpoints, Pair
from spectral_fast.toolbox.extraction.parts import Extracted, Parts


class NothingDiffersError(ValueError):
    """No linear layer differs, so there is no adapter."""


@dataclass(frozen=True)
class Extraction:
    """What an extraction found.

    Attributes:
        modules: name -> its result without the factors, for every module of the adapter.
        ranks: name -> rank.
        equal: linear layers that both checkpoints have the same.
        lost: changed tensor -> why LoRA cannot hold its change; it is not in the adapter.
        saved: changed tensors that the adapter has in full (modules_to_save).
        warnings: what to know before trusting the differences.
    """

    modules: dict[str, Extracted]
    ranks: dict[str, int]
    equal: list[str]
    lost: dict[str, str]
    saved: list[str]
    warnings: list[str]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "modules": {
                name: {"r": self.ranks[name], "norm": x.norm, "error": x.error / x.norm, "reached": x.reached}
                for name, x in self.modules.items()
            },
            "equal": self.equal,
            "lost": self.lost,
            "saved": self.saved,
            "warnings": self.warnings,
        }


def collect(found: Checkpoints, parts: Parts, changed: Sequence[Pair], *, modules_to_save: bool) -> Extraction:
    """What is in the adapter, and what is not, of the matrices and of the others that changed."""
    infos = {pair.name: parts.b_info(pair.name) for pair in found.matrices}
    ranks = {pair.module: 0 if (info := infos[pair.name]) is None else info.shape[1] for pair in found.matrices}
    adapted = {name for name, r in ranks.items() if r}
    saved = [pair.name for pair in changed if modules_to_save and _can_be_saved(pair, found, adapted)]
    if not adapted:
        more = f"; {changed[0].name} does, and {len(changed) - 1} others, but {changed[0].reason}" if changed else ""
        raise NothingDiffersError(
            f"none of {len(ranks)} linear layers differs between the two models: nothing to extract{more}"
        )
    return Extraction(
        {pair.module: parts.facts(pair.name) for pair in found.matrices if pair.module in adapted},
        {name: ranks[name] for name in ranks if name in adapted},
        [name for name, r in ranks.items() if not r],
        {pair.name: pair.reason for pair in changed if pair.name not in saved},
        saved,
        found.warnings,
    )


def _can_be_saved(pair: Pair, found: Checkpoints, adapted: set[str]) -> bool:
    """PEFT saves whole modules: one that has no others in it, no adapter, and its shape in the base model."""
    return (
        pair.module != ""
        and pair.module not in found.children
        and pair.module not in adapted
        and pair.base().shape == pair.info.shape
    )


def write(
    found: Checkpoints,
    parts: Parts,
    result: Extraction,
    out_dir: Path | str,
    base_model: str,
    extra_files: Mapping[str, Callable[[], bytes]],
    *,
    sources: Sequence[Path],
    overwrite: bool,
) -> None:
    """The adapter of finished modules; see `creating`."""
    pairs = {pair.module: pair for pair in found.matrices if pair.module in result.ranks}
    modules = {}
    for name, pair in pairs.items():
        info = parts.b_info(pair.name)
        assert info is not None
        modules[name] = plain_module(f"{PEFT_PREFIX}{name}", *pair.shape, info.shape[1], info.dtype)
    saved = {pair.name: pair for pair in found.others if pair.name in result.saved}
    owners = {name.rpartition(".")[0] for pair in saved.values() for name in (pair.name, *pair.tied)}
    others: dict[str, Other] = {
        f"{PEFT_PREFIX}{name}": (pair.info, pair.tuned)
        for pair in (*found.others, *found.matrices)
        for name in (pair.name, *pair.tied)
        if name.rpartition(".")[0] in owners
    }
    config = new_config(
        modules.values(),
        {
            "base_model_name_or_path": base_model,
            "task_type": "CAUSAL_LM" if found.model_class.endswith("ForCausalLM") else None,
            "target_modules": _in_short(list(pairs), found),
            "fan_in_fan_out": any(pair.transposed for pair in pairs.values()),
            "modules_to_save": sorted(owners) or None,
        },
    )

    with creating(
        out_dir, config, modules.values(), extra_files, others=others, sources=sources, overwrite=overwrite
    ) as put:
        for name, pair in pairs.items():
            put(modules[name].name, *parts.factors(pair.name))


def _in_short(names: Sequence[str], found: Checkpoints) -> list[str]:
    """Last components, if they name no other linear layer that the adapter would then have; else full names."""
    components = sorted({name.rpartition(".")[2] for name in names})
    every = {pair.module for pair in (*found.matrices, *found.others)}
    same = {name for name in every if name.rpartition(".")[2] in components}
    return components if same == set(names) else list(names)

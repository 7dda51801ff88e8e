"""The edit: read each module's factors, reweight its singular values by a policy, write the factors back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.backends import chosen_backends
from spectral_fast.policies import Edit, Policy
from spectral_fast.provenance import versions
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity
from spectral_fast.spectrum import lowrank_svd

META = "spectral_edit_meta.json"
Progress = Callable[[Sequence[LoraModule]], Iterable[LoraModule]]


@dataclass(frozen=True)
class EditedModule:
    """What happened to one module: its singular values s, their sensitivities g (if used) and the edit."""

    s: Tensor
    g: Tensor | None
    edit: Edit


def edit_adapter(
    adapter: Adapter,
    policy: Policy,
    out_dir: Path,
    *,
    modules: Sequence[LoraModule] | None = None,
    sensitivity: Sensitivity | None = None,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> dict[str, EditedModule]:
    """Write an edited copy of an adapter: B' = U diag(√s'), A' = diag(√s') Vᵀ for s' = policy(s, g).

    One module is in memory at a time. The copy has the source's format, dtypes and other files, and
    `spectral_edit_meta.json` with all that repeats the run. It appears at once when complete, or not at all.

    Args:
        adapter: the adapter, opened; it is never touched.
        policy: rule from (s, g) to s'.
        out_dir: folder to write, which must not hold anything unless `overwrite`.
        modules: what to edit; by default every module that can be edited.
        sensitivity: g per module; may be None for a policy that needs none.
        meta: more entries for the "meta" part of `spectral_edit_meta.json`.
        overwrite: replace a folder that exists.
        progress: wraps the list of modules.

    Returns:
        module name -> what happened to it, in the order of `modules`.

    Raises:
        ValueError: if the sensitivity was measured on another adapter or lacks a module, or if some value is not
            finite; always naming the module. Nothing is written then.
        FileExistsError: if out_dir holds something and `overwrite` is false.

    Source: Tian et al., "Spectral Surgery", arXiv:2603.03995.
    """
    chosen = list(adapter.modules.values()) if modules is None else list(modules)
    if policy.needs_sensitivity:
        _check_sensitivity(adapter, chosen, sensitivity)
    edited: dict[str, EditedModule] = {}

    def rebuilt() -> Iterator[tuple[LoraModule, Tensor, Tensor]]:
        for module in progress(chosen):
            b, a = adapter.read(module)
            [spectrum] = lowrank_svd([b], [a], [module.name])
            g = None
            if policy.needs_sensitivity and sensitivity is not None:
                g = _matching_g(module, spectrum.s, sensitivity.modules[module.name])
            edit = policy.apply(spectrum.s, g, module.name)
            edited[module.name] = EditedModule(spectrum.s, g, edit)
            yield module, *spectrum.rebuild(edit.s_new)

    def record() -> bytes:
        probed = dict(sensitivity.record) if policy.needs_sensitivity and sensitivity is not None else {}
        content = {
            "meta": {
                **_flat(probed),
                "lora_path": str(adapter.path),
                "adapter_sha256": adapter.fingerprint(),
                "mode": policy.mode,
                **asdict(policy),
                **(meta or {}),
                "versions": versions(),
                "backends": chosen_backends(),
                "probe": probed or None,
            },
            "sigma_stats": {name: module.edit.stats for name, module in edited.items()},
        }
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()

    adapter.write(out_dir, rebuilt(), extra_files={META: record}, overwrite=overwrite)
    return edited


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a probe's record that the method's own meta has at its top level."""
    return {key: record.get(key) for key in ("base_model", "calib_data", "calib_samples", "calib_batch_size")}


def _check_sensitivity(adapter: Adapter, modules: Iterable[LoraModule], sensitivity: Sensitivity | None) -> None:
    if sensitivity is None:
        raise ValueError("this mode needs sensitivities: probe the adapter first, or give a base model to probe with")
    measured_on = sensitivity.record.get("adapter_sha256")
    if measured_on is not None and measured_on != adapter.fingerprint():
        raise ValueError(
            f"the sensitivities were measured on another adapter (sha256 {measured_on[:12]}…, {adapter.path} has "
            f"{adapter.fingerprint()[:12]}…); probe this adapter"
        )
    missing = [module.name for module in modules if module.name not in sensitivity.modules]
    if missing:
        raise ValueError(
            f"the sensitivities lack {len(missing)} of the selected modules, e.g. {missing[0]}; "
            "probe with the same --target_modules, --layer_min and --layer_max"
        )


def _matching_g(module: LoraModule, s: Tensor, measured: ModuleSensitivity) -> Tensor:
    """g, after a check that its directions are those of s: same singular values within the SVD's error bound."""
    bound = 30 * module.r * torch.finfo(torch.float32).eps
    if measured.s.shape != s.shape or ((measured.s - s).abs() > bound * s.amax()).any():
        raise ValueError(
            f"{module.name}: the singular values in the sensitivity file are not this module's; probe again"
        )
    return measured.g

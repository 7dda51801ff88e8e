"""The edit: read each module's factors, reweight its singular values by a policy, write the factors back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.backends import chosen_backends
from spectral_fast.pipeline import in_order
from spectral_fast.policies import Edit, Policy
from spectral_fast.provenance import versions
from spectral_fast.sensitivity import Sensitivity
from spectral_fast.spectrum import lowrank_svd, rebuild

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
    out_dir: Path | str,
    *,
    modules: Sequence[LoraModule] | None = None,
    sensitivity: Sensitivity | None = None,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> dict[str, EditedModule]:
    """Write an edited copy of an adapter: B' = U diag(√s'), A' = diag(√s') Vᵀ for s' = policy(s, g).

    Reading, SVD, rebuilding and writing of different modules overlap, and the source is hashed beside them, unless
    its files are as `probe` left them; a module per thread is in memory, and one more. The bytes do not depend on the
    number of threads. The copy has the source's format, dtypes and other files, and `spectral_edit_meta.json` with
    all that repeats the run. It appears at once when complete, or not at all.

    Args:
        adapter: the adapter, opened; it is never touched.
        policy: rule from (s, g) to s'.
        out_dir: folder to write, which must not hold anything unless `overwrite`.
        modules: what to edit; by default those that were measured, or every module that can be edited if the policy
            needs no measurement.
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

    Example:
        >>> from spectral_fast import Adapter, edit_adapter, embedded
        >>> from spectral_fast.policies import RandomIndex  # the control, which needs no sensitivities
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> edited = edit_adapter(adapter, RandomIndex(seed=1), "control", modules=adapter.select(("o_proj",)))
        >>> module = edited["base_model.model.model.layers.0.self_attn.o_proj"]
        >>> module.s.shape, module.edit.s_new.shape
        (torch.Size([32]), torch.Size([32]))
        >>> Adapter.open("control").modules.keys() == adapter.modules.keys()
        True
    """
    chosen = _default(adapter, policy, sensitivity) if modules is None else list(modules)
    threads = torch.get_num_threads()
    slots = [adapter.memory_for(chosen) for _ in range(threads + 1)]
    edited: dict[str, EditedModule] = {}
    probed = dict(sensitivity.record) if policy.needs_sensitivity and sensitivity is not None else {}
    with adapter.fingerprint_meanwhile(probed) as fingerprint:
        measured = None
        if policy.needs_sensitivity:
            measured = Measured(adapter, sensitivity, fingerprint)
            measured.check_covers(chosen)

        def edit(module: LoraModule, memory: Tensor) -> tuple[str, EditedModule]:
            b, a = adapter.read(module, memory)
            [spectrum] = lowrank_svd([b], [a], [module.name])
            s = spectrum.s.clone()  # the spectrum's own may be part of its transforms' memory, and keep it alive
            g = None if measured is None else measured.g(module, s)
            result = EditedModule(s, g, policy.apply(s, g, module.name))
            rebuild([spectrum], [result.edit.s_new], [(b, a)], [module.name])
            put(module, b, a)  # here, where the cache still has them
            return module.name, result

        def record() -> bytes:
            if measured is not None:
                measured.check_adapter()
            content = {
                "meta": {
                    **_flat(probed),
                    "lora_path": str(adapter.path),
                    "adapter_sha256": fingerprint(),
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

        with (
            adapter.rewriting(out_dir, {META: record}, overwrite=overwrite, check_finite=False) as put,
            in_order(edit, progress(chosen), slots, threads) as results,
        ):
            edited.update(results)
    return edited


def _default(adapter: Adapter, policy: Policy, sensitivity: Sensitivity | None) -> list[LoraModule]:
    """The modules that were measured; all where none was, so that it is said which are missing."""
    every = list(adapter.modules.values())
    if not policy.needs_sensitivity or sensitivity is None:
        return every
    return [module for module in every if module.name in sensitivity.modules] or every


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a probe's record that the method's own meta has at its top level."""
    return {key: record.get(key) for key in ("base_model", "calib_data", "calib_samples", "calib_batch_size")}


class Measured:
    """The sensitivities, checked against the adapter as it is read.

    Args:
        adapter: the adapter.
        sensitivity: what was measured; None is refused.
        fingerprint: gives the adapter's, as `Adapter.fingerprint_meanwhile` does.

    That they are another adapter's is known only when this one is hashed. It explains every other misfit, so
    whichever is found first, that is what is raised.
    """

    def __init__(self, adapter: Adapter, sensitivity: Sensitivity | None, fingerprint: Callable[[], str]) -> None:
        if sensitivity is None:
            raise ValueError(
                "this mode needs sensitivities: probe the adapter first, or give a base model to probe with"
            )
        self.path, self.sensitivity, self._fingerprint = adapter.path, sensitivity, fingerprint

    def check_adapter(self) -> None:
        """Refuse sensitivities of another adapter."""
        measured_on = self.sensitivity.record.get("adapter_sha256")
        if measured_on is not None and measured_on != self._fingerprint():
            raise ValueError(
                f"the sensitivities were measured on another adapter (sha256 {measured_on[:12]}…, {self.path} has "
                f"{self._fingerprint()[:12]}…); probe this adapter"
            )

    def check_covers(self, modules: Iterable[LoraModule]) -> None:
        """Refuse modules that were not measured."""
        missing = [module.name for module in modules if module.name not in self.sensitivity.modules]
        if missing:
            self.check_adapter()
            raise ValueError(
                f"the sensitivities lack {len(missing)} of the selected modules, e.g. {missing[0]}; "
                "probe with the same --target_modules, --layer_min and --layer_max"
            )

    def g(self, module: LoraModule, s: Tensor) -> Tensor:
        """g, after a check that its directions are those of s: same singular values within the SVD's error bound."""
        measured = self.sensitivity.modules[module.name]
        bound = 30 * module.r * torch.finfo(torch.float32).eps
        if measured.s.shape != s.shape or ((measured.s - s).abs() > bound * s.amax()).any():
            self.check_adapter()
            raise ValueError(
                f"{module.name}: the singular values in the sensitivity file are not this module's; probe again"
            )
        return measured.g

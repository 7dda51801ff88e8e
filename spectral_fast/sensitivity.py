"""Sensitivities of an adapter's singular directions, in memory and as the pair of files that `probe` leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, RECORD = "sensitivity.safetensors", "sensitivity.json"
FORMAT = 1


@dataclass(frozen=True)
class ModuleSensitivity:
    """Of one module: singular values s and g = ∂L/∂s, both (r,) float64, in the same order, s descending."""

    s: Tensor
    g: Tensor

    def __post_init__(self) -> None:
        if self.s.ndim != 1 or self.s.shape != self.g.shape:
            raise ValueError(f"s and g must be vectors of one length, got {tuple(self.s.shape)}, {tuple(self.g.shape)}")


@dataclass(frozen=True)
class Sensitivity:
    """Module name -> (s, g), with the record of how it was measured.

    Attributes:
        modules: by module name as in the adapter's file, e.g. `base_model.model.model.layers.0.self_attn.o_proj`.
        record: provenance, JSON-serialisable; `adapter_sha256` ties it to the adapter that it was measured on.
    """

    modules: Mapping[str, ModuleSensitivity]
    record: Mapping[str, Any] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write `sensitivity.safetensors` and `sensitivity.json` into an existing directory."""
        tensors = {f"{name}.sigma": module.s.contiguous() for name, module in self.modules.items()}
        tensors |= {f"{name}.g": module.g.contiguous() for name, module in self.modules.items()}
        save_file(tensors, directory / TENSORS)
        (directory / TENSORS).chmod(0o644)  # safetensors leaves 0600
        record = {"format": FORMAT, "modules": list(self.modules), **self.record}
        (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path | str) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if one of the two files is missing.
            ValueError: if they are damaged, of another format, or do not belong together.
        """
        directory = Path(directory)
        for file in (TENSORS, RECORD):
            if not (directory / file).is_file():
                raise FileNotFoundError(
                    f"{directory} has no {file}; `spectral-fast probe --out_dir {directory}` makes it"
                )
        try:
            record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
            tensors = load_file(directory / TENSORS)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise ValueError(f"{directory}: damaged sensitivity files ({error}); probe again") from error
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ValueError(f"{directory / RECORD} is not a sensitivity record of format {FORMAT}; probe again")
        names = record.pop("modules", [])
        if not isinstance(names, list) or not isinstance(record.get("adapter_sha256", ""), str):
            raise ValueError(f"{directory / RECORD} is damaged (modules or adapter_sha256); probe again")
        wanted = {f"{name}.{kind}" for name in names for kind in ("sigma", "g")}
        if wanted != set(tensors):
            odd = min(wanted ^ set(tensors))
            raise ValueError(f"{directory}: {TENSORS} and {RECORD} do not belong together ({odd} is in one only)")
        modules = {name: ModuleSensitivity(tensors[f"{name}.sigma"], tensors[f"{name}.g"]) for name in names}
        for name, module in modules.items():
            if not (torch.isfinite(module.s).all() and torch.isfinite(module.g).all()):
                raise ValueError(f"{directory / TENSORS}: NaN or infinity in {name}; probe again")
        return cls(modules, record)

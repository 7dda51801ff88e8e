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
    """Of one module: singular values, and the gradient of the loss by them.

    Attributes:
        s: (r,) float64, descending.
        g: (r,) float64, ∂L/∂s in the same order.
        samples: (n, r) float32 (float64 from a float64 model), the part of each calibration sample in g, in the order
            of the calibration set; g is their sum over n. None if it was not kept.
    """

    s: Tensor
    g: Tensor
    samples: Tensor | None = None

    def __post_init__(self) -> None:
        if self.s.ndim != 1 or self.s.shape != self.g.shape:
            raise ValueError(f"s and g must be vectors of one length, got {tuple(self.s.shape)}, {tuple(self.g.shape)}")
        if self.samples is not None:
            self._check_samples(self.samples)

    @classmethod
    def of_samples(cls, s: Tensor, samples: Tensor) -> ModuleSensitivity:
        """With g as the float64 sum of its parts.

        Args:
            s: (r,) float64, descending.
            samples: (n, r) float32 or float64.
        """
        return cls(s, samples.double().sum(0), samples)

    def _check_samples(self, samples: Tensor) -> None:
        """That they are the parts of g: n terms added in float64, in whatever order, err by (n - 1) ε Σ|c| at most."""
        r, n = self.s.numel(), len(samples) if samples.ndim else 0
        if samples.shape != (n, r) or n < 1 or samples.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"samples must be (n, {r}) float32 with n >= 1, as g has {r} values; got {tuple(samples.shape)} "
                f"{str(samples.dtype).removeprefix('torch.')}"
            )
        parts = samples.double()
        bound = 2 * n * torch.finfo(torch.float64).eps * parts.abs().sum(0)
        wrong = ~((parts.sum(0) - self.g).abs() <= bound)  # True for NaN too
        if wrong.any():
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"the {n} samples must sum to g; in direction {k} they sum to {parts[:, k].sum():g}, but g is "
                f"{self.g[k]:g}"
            )


@dataclass(frozen=True)
class Sensitivity:
    """Module name -> (s, g), with the record of how it was measured.

    Attributes:
        modules: by module name as in the adapter's file, e.g. `base_model.model.model.layers.0.self_attn.o_proj`.
        record: provenance, JSON-serialisable; `adapter_sha256` ties it to the adapter that it was measured on.

    Example:
        >>> import torch
        >>> from spectral_fast import Sensitivity
        >>> from spectral_fast.sensitivity import ModuleSensitivity
        >>> s = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> parts = torch.tensor([[0.5, -1.0], [0.25, 1.5]])  # of two samples
        >>> Sensitivity({"o_proj": ModuleSensitivity.of_samples(s, parts)}).save("probed")
        >>> Sensitivity.load("probed").modules["o_proj"].g
        tensor([0.7500, 0.5000], dtype=torch.float64)
    """

    modules: Mapping[str, ModuleSensitivity]
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts: dict[int | None, str] = {}
        for name, module in self.modules.items():
            counts.setdefault(None if module.samples is None else len(module.samples), name)
        if len(counts) > 1:
            (one, first), (other, second), *_ = ((count or "none", name) for count, name in counts.items())
            raise ValueError(f"modules must have g of the same samples; {first} has {one}, {second} has {other}")

    @property
    def samples(self) -> dict[str, Tensor] | None:
        """Module name -> (n, r) part of each calibration sample in g; None if they were not kept."""
        found = {name: module.samples for name, module in self.modules.items() if module.samples is not None}
        return found or None

    def save(self, directory: Path | str) -> None:
        """Write `sensitivity.safetensors` and `sensitivity.json` into a directory, which is made if it is missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.sigma": module.s.contiguous() for name, module in self.modules.items()}
        tensors |= {f"{name}.g": module.g.contiguous() for name, module in self.modules.items()}
        tensors |= {f"{name}.samples": parts.contiguous() for name, parts in (self.samples or {}).items()}
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
                    f"{directory} has no {file}: give a folder that `spectral-fast probe --out_dir` wrote"
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
        if any(name.endswith(".samples") for name in tensors.keys() - wanted):
            wanted |= {f"{name}.samples" for name in names}
        if wanted != set(tensors):
            odd = min(wanted ^ set(tensors))
            raise ValueError(f"{directory}: {TENSORS} and {RECORD} do not belong together ({odd} is in one only)")
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{directory / TENSORS}: NaN or infinity in {name}; probe again")
        try:
            return cls({name: _module(name, tensors) for name in names}, record)
        except ValueError as error:
            raise ValueError(f"{directory / TENSORS}: {error}; probe again") from error


def _module(name: str, tensors: Mapping[str, Tensor]) -> ModuleSensitivity:
    try:
        return ModuleSensitivity(tensors[f"{name}.sigma"], tensors[f"{name}.g"], tensors.get(f"{name}.samples"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

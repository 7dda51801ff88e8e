"""Modules of an unfinished extraction on disk: what is there need not be done again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectral_fast.calibration.streaming.work_folder import Stage
from spectral_fast.tensorfile import SafetensorsFile, TensorInfo

_LARGEST, _LONGEST = 64 << 20, 2.0  # bytes and seconds of results that wait to be written


@dataclass(frozen=True)
class Extracted:
    """One module's result.

    Attributes:
        b: (m, k), and None if the tensors are equal.
        a: (k, n), likewise.
        norm: ‖ΔW‖_F.
        error: ‖ΔW − B A‖_F, rounding to the stored dtype apart.
        reached: whether it is as small as was asked for.
    """

    b: Tensor | None
    a: Tensor | None
    norm: float
    error: float
    reached: bool

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All of it, by the names in a part."""
        facts = torch.tensor([self.norm, self.error, self.reached], dtype=torch.float64)
        factors = {} if self.b is None or self.a is None else {f"{name}:b": self.b, f"{name}:a": self.a}
        return {f"{name}:facts": facts, **factors}


class Parts:
    """Results that come one by one and are kept in files of some size, each there as a whole or not at all.

    Args:
        path: a folder; what is there already counts as done.
    """

    def __init__(self, path: Path) -> None:
        self._stage = Stage(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._waiting: dict[str, Tensor] = {}
        self._since, self._size = time.monotonic(), 0
        self._number = 0
        while self._stage.has(self._name):
            self._learn()

    def has(self, name: str) -> bool:
        """Whether the module is done."""
        return f"{name}:facts" in self._files or f"{name}:facts" in self._waiting

    def add(self, name: str, found: Extracted) -> None:
        """Keep a module's result."""
        tensors = found.tensors(name)
        self._waiting |= tensors
        self._size += sum(tensor.nbytes for tensor in tensors.values())
        if self._size > _LARGEST or time.monotonic() - self._since > _LONGEST:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            infos = {name: TensorInfo(x.dtype, tuple(x.shape)) for name, x in self._waiting.items()}
            with self._stage.writing(self._name, infos) as put:
                for name, tensor in self._waiting.items():
                    put(name, tensor)
            self._waiting.clear()
            self._learn()
        self._since, self._size = time.monotonic(), 0

    def facts(self, name: str) -> Extracted:
        """A module's result without the factors, after `flush`."""
        norm, error, reached = self._files[f"{name}:facts"].read(f"{name}:facts").tolist()
        return Extracted(None, None, norm, error, bool(reached))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """B (m, k) and A (k, n) of a module that has them, after `flush`."""
        b, a = (self._files[key].read(key) for key in (f"{name}:b", f"{name}:a"))
        return b, a

    def b_info(self, name: str) -> TensorInfo | None:
        """Shape and dtype of a module's B, after `flush`; None if it has no factors."""
        key = f"{name}:b"
        return self._files[key].tensors[key] if key in self._files else None

    @property
    def _name(self) -> str:
        return f"part-{self._number:05d}"

    def _learn(self) -> None:
        file = self._stage.open(self._name)
        self._files.update(dict.fromkeys(file.tensors, file))
        self._number += 1

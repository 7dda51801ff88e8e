"""The settings of layer-major calibration."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectral_fast.options import check, option

if TYPE_CHECKING:
    import torch

_UNITS = {"": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StreamOptions:
    """Whether the base model is read one layer at a time, and what may be kept meanwhile."""

    stream: bool = option(
        False,
        "read the base model one layer at a time: two layers and activation_memory are in memory instead of all of it",
    )
    activation_memory: str | None = option(
        None,
        "with --stream: memory for activations that are kept for the backward pass instead of computed again, such as "
        "8GB or 500MB (a plain number is in GB), in each process",
        shown="half of what is free at the start",
    )
    resume: bool = option(
        False, "with --stream: go on where a killed run with the same settings stopped; starts anew if there is none"
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.stream and (self.resume or self.activation_memory is not None):
            flag = "resume" if self.resume else "activation_memory"
            raise ValueError(f"--{flag} says how to stream, and --stream is not given")
        if self.activation_memory is not None:
            _bytes(self.activation_memory)

    def budget(self, device: torch.device) -> int:
        """Bytes for activations that are kept in this process."""
        if self.activation_memory is not None:
            return _bytes(self.activation_memory)
        # The processes that torchrun starts on a machine have a GPU each, but one memory.
        sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return _available(device) // (2 * sharing)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Z]*)", text.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"activation_memory must be a size such as 8GB, 500MB or 2.5 (GB); got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def _available(device: torch.device) -> int:
    """Memory that a new allocation could have: of the GPU, or of the machine within the limit of the container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free

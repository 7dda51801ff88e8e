"""What this machine offers: versions, devices, and for every op the backend it would take and why others refuse."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import spectral_fast.kernels.lowrank_svd  # imported for its registration
import spectral_fast.kernels.recompose
import spectral_fast.kernels.sensitivity  # noqa: F401
from spectral_fast.backends import native_missing, registered
from spectral_fast.provenance import versions


def describe() -> dict[str, Any]:
    """Versions, processor, devices and backends as one JSON-serialisable dict."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "isa": _isa(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ops": {
            op: {backend.name: backend.refuses() or "available" for backend in backends}
            for op, backends in registered().items()
        },
    }


def _isa() -> dict[str, Any] | str:
    """The native module's instruction set in use, those of the processor and of the build; or why there is none."""
    if reason := native_missing():
        return reason
    from spectral_fast import _C

    return _C.isa()


def as_text(facts: dict[str, Any]) -> str:
    """`describe()` for people."""
    lines = [f"{name:<14} {version}" for name, version in facts["versions"].items()]
    devices = ", ".join(facts["cuda_devices"]) or "no CUDA device"
    lines += [facts["platform"], f"{facts['cpus']} CPUs, {facts['torch_threads']} torch threads, {devices}"]
    isa = facts["isa"]
    lines += [isa if isinstance(isa, str) else f"instruction set: {isa['chosen']} (of {', '.join(isa['supported'])})"]
    for op, backends in facts["ops"].items():
        lines += [f"{op}: " + "; ".join(f"{name} {state}" for name, state in backends.items())]
    return "\n".join(lines)

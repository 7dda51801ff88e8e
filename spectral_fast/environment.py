"""What this machine offers: versions, devices, and for every op the backend it would take and why others refuse."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import spectral_fast.kernels.lowrank_svd  # noqa: F401  (imported for its registration)
from spectral_fast.backends import registered
from spectral_fast.provenance import versions


def describe() -> dict[str, Any]:
    """Versions, processor, devices and backends as one JSON-serialisable dict."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ops": {
            op: {backend.name: backend.refuses() or "available" for backend in backends}
            for op, backends in registered().items()
        },
    }


def as_text(facts: dict[str, Any]) -> str:
    """`describe()` for people."""
    lines = [f"{name:<14} {version}" for name, version in facts["versions"].items()]
    devices = ", ".join(facts["cuda_devices"]) or "no CUDA device"
    lines += [facts["platform"], f"{facts['cpus']} CPUs, {facts['torch_threads']} torch threads, {devices}"]
    for op, backends in facts["ops"].items():
        lines += [f"{op}: " + "; ".join(f"{name} {state}" for name, state in backends.items())]
    return "\n".join(lines)

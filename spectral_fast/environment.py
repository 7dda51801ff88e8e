"""What this machine offers: versions, devices, and for every op the backend it would take and why others refuse."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

import spectral_fast.kernels.batched_svd  # imported for its registration
import spectral_fast.kernels.frequent_directions
import spectral_fast.kernels.head_sketch
import spectral_fast.kernels.lowrank_svd
import spectral_fast.kernels.recompose
import spectral_fast.kernels.sensitivity
import spectral_fast.kernels.spectral_linear  # noqa: F401
from spectral_fast.backends import ENVIRONMENT_VARIABLE, Backend, native_missing, pick, registered
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
        "ops": {op: {"takes": _taken(op), **_states(backends)} for op, backends in registered().items()},
    }


def _taken(op: str) -> str:
    """The backend that an op would take, or why it would take none, as when one is forced that refuses."""
    try:
        return pick(op).name
    except RuntimeError as error:
        return f"none: {error}"


def _states(backends: Sequence[Backend]) -> dict[str, Any]:
    """Reasons of the backends that refuse on this machine, and whether there is one for tensors on a GPU."""
    refusals = {backend.name: reason for backend in backends if (reason := backend.refuses())}
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "") in {x.name for x in backends}
    return {
        "refusals": refusals,
        "gpu": not forced and any(x.name == "gpu" and x.name not in refusals for x in backends),
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
        refusals = [f"; {name} refuses: {reason}" for name, reason in backends["refusals"].items()]
        if backends["takes"].startswith("none"):  # which says why
            refusals = []
        on_gpu = "; gpu for tensors on a GPU" if backends["gpu"] and backends["takes"] != "gpu" else ""
        lines += [f"{op} takes {backends['takes']}{on_gpu}" + "".join(refusals)]
    return "\n".join(lines)

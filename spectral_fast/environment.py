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
import spectral_fast.kernels.spectral_linear
import spectral_fast.kernels.spline  # noqa: F401
from spectral_fast.backends import ENVIRONMENT_VARIABLE, Backend, native_missing, pick, registered
from spectral_fast.provenance import versions

# What the package reads of the environment; its libraries read more, such as OMP_NUM_THREADS and HF_HOME.
VARIABLES = {
    "SPECTRAL_FAST_BACKEND": "cpu, gpu or reference: takes that backend for every op that has it; an error where it "
    "refuses",
    "SPECTRAL_FAST_ISA": "avx512, avx2, scalar or, on Arm, neon: the instruction set of the native kernels; otherwise "
    "the first of them that build and processor have",
    "SPECTRAL_FAST_CUDA": "path of the library that `make cuda` builds: takes its SVD in place of Triton's",
    "SPECTRAL_FAST_DEBUG": "any value: errors come with their traceback",
    "TRITON_INTERPRET": "1: Triton's kernels run as Python on the CPU, for `bench --device interpreter` and tests",
    "RANK": "number of this process among those of `probe`; set by torchrun, as the next five",
    "WORLD_SIZE": "how many processes there are",
    "LOCAL_RANK": "number of this process on its machine: that of its GPU",
    "LOCAL_WORLD_SIZE": "how many processes share the machine's memory, with --stream on a CPU",
    "MASTER_ADDR": "address at which the processes meet",
    "MASTER_PORT": "port at which they meet",
    "VLLM_GPU_MEMORY_UTILIZATION": "share of a GPU's memory that vLLM takes; --gpu_memory_utilization wins",
    "VLLM_CPU_KVCACHE_SPACE": "GiB for vLLM's keys and values on a CPU; otherwise derived from the free memory",
    "VLLM_ENFORCE_EAGER": "1: as --enforce_eager",
    "VLLM_LOGGING_LEVEL": "of vLLM; WARNING if not set",
    "TRANSFORMERS_VERBOSITY": "of transformers; error if not set",
    "HF_HUB_DISABLE_PROGRESS_BARS": "of huggingface_hub; 1 if not set",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "of datasets, in `train`; 1 if not set",
    "WANDB_PROJECT": "of Weights & Biases, in `train`; the field project if not set",
    "OPENBLAS_CORETYPE": "of OpenBLAS; the only one, with the next, that programs in the sandbox see",
    "OPENBLAS_L2_SIZE": "of OpenBLAS",
}


def describe() -> dict[str, Any]:
    """Versions, processor, devices and backends as one JSON-serialisable dict."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
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
    lines += [f"{name}={value}" for name, value in facts["environment"].items()]
    isa = facts["isa"]
    lines += [isa if isinstance(isa, str) else f"instruction set: {isa['chosen']} (of {', '.join(isa['supported'])})"]
    for op, backends in facts["ops"].items():
        refusals = [f"; {name} refuses: {reason}" for name, reason in backends["refusals"].items()]
        if backends["takes"].startswith("none"):  # which says why
            refusals = []
        on_gpu = "; gpu for tensors on a GPU" if backends["gpu"] and backends["takes"] != "gpu" else ""
        lines += [f"{op} takes {backends['takes']}{on_gpu}" + "".join(refusals)]
    return "\n".join(lines)

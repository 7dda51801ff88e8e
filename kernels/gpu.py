"""What every Triton kernel needs: where it can run, and in which configurations it is shipped.

Without autotuning: a configuration is chosen by architecture and shape class, and each that can be chosen is listed
by its op's ``shipped``, compiled ahead of time and checked. Nothing here imports triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE

# Triton's own switch: its kernels then run as Python on tensors in host memory.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_one_at_a_time = Lock()  # the interpreter is not made for several threads

# The ranks that kernels are compiled for; others take the next one, masked.
RANKS = (16, 32, 64, 128, 256)
FEWER_RANKS = (16, 64, 256)  # of float16, which few adapters still are


def compiled_rank(r: int, ranks: Iterable[int] = RANKS) -> int:
    """The first of the ascending ranks that holds rank r."""
    return next(rank for rank in ranks if r <= rank)


class Architecture(NamedTuple):
    """What a program may use of a multiprocessor.

    Attributes:
        shared: bytes of shared memory that one program can have.
        float64: whether float64 arithmetic is at least half as fast as float32.
    """

    shared: int
    float64: bool


# The shipped configurations. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3
# instruction set reference, local data share.
ARCHITECTURES = {
    "sm_80": Architecture(163 * 1024, True),
    "sm_90": Architecture(227 * 1024, True),
    "sm_100": Architecture(227 * 1024, True),
    "sm_120": Architecture(99 * 1024, False),
    "gfx942": Architecture(64 * 1024, True),
}


@dataclass(frozen=True)
class Variant:
    """A kernel in one configuration: what is launched, and what the ahead-of-time compiler is given.

    Attributes:
        kernel: the jitted function.
        constants: its constexpr arguments by name.
        warps: per program.
        stages: of software pipelining.
        fusion: whether a multiplication and an addition may become one rounding.
    """

    kernel: Any
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    fusion: bool = True

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        """Runs the kernel on the current stream of its first argument's device; without programs, nothing."""
        if all(grid):
            with torch.cuda.device_of(args[0]), _one_at_a_time if INTERPRETED else nullcontext():
                self.kernel[grid](
                    *args,
                    **self.constants,
                    num_warps=self.warps,
                    num_stages=self.stages,
                    enable_fp_fusion=self.fusion,
                )


class Shipped(NamedTuple):
    """A variant that an architecture may be asked to run, as the ahead-of-time compiler wants it.

    Attributes:
        name: the op, the kernel and what distinguishes the variant, in words.
        variant: the configuration.
        signature: Triton's type of each argument that is no constant, in order: "*bf16", "i32", "i64" ... A pointer
            is taken to be aligned to 16 bytes; a size that is always a multiple of 16 is "i32:16".
        matrix: whether its products must run on matrix units.
    """

    name: str
    variant: Variant
    signature: Mapping[str, str]
    matrix: bool = False


def architecture(device: torch.device) -> str:
    """The key of ``ARCHITECTURES`` whose configurations suit a device; under the interpreter, that of an H100.

    Raises:
        RuntimeError: none does; `refuses` has said so before.
    """
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        # These have 99 KiB of shared memory or slow float64, as sm_120 has.
        name = {"sm_86": "sm_120", "sm_89": "sm_120", "sm_103": "sm_120", "sm_121": "sm_120"}.get(name, name)
    if name not in ARCHITECTURES:
        raise RuntimeError(f"{device} is {name}; kernels are compiled for {', '.join(ARCHITECTURES)}")
    return name


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def refuses(tensors: Iterable[Tensor] = ()) -> str | None:
    """Wants Triton and tensors on a GPU; in host memory under Triton's interpreter, which must be asked for.

    Without tensors it answers for this machine.
    """
    if not _triton_installed():
        return "triton is not installed; pip install 'spectral-fast[gpu]'"
    if INTERPRETED and os.environ.get(ENVIRONMENT_VARIABLE) != "gpu":
        return f"Triton's interpreter is on, which is for tests; {ENVIRONMENT_VARIABLE}=gpu takes it all the same"
    if INTERPRETED:
        wanted, missing = "cpu", None
    else:
        wanted = "cuda"
        missing = None if torch.cuda.is_available() else "torch sees no GPU"
    tensors = list(tensors)
    if elsewhere := {str(x.device) for x in tensors if x.device.type != wanted}:
        return f"tensors are on {', '.join(sorted(elsewhere))}"
    if any(x.is_neg() for x in tensors):
        return "a tensor is negated lazily; resolve_neg() makes it a plain one"
    if missing:
        return missing
    try:
        for device in {x.device for x in tensors} or {torch.device(wanted)}:
            architecture(device)
    except RuntimeError as error:
        return str(error)
    return None


def refuses_together(tensors: Iterable[Tensor]) -> str | None:
    """The same, and wants all of them on one device."""
    tensors = list(tensors)
    devices = {str(x.device) for x in tensors}
    return refuses(tensors) if len(devices) < 2 else f"tensors are on {', '.join(sorted(devices))}"

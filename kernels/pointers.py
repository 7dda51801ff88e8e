"""Tables of addresses: how a Triton kernel reads and writes tensors of several sizes and dtypes in one launch.

A dtype is a code (``native.CODES``) that all threads of a program share, so that one kernel serves all dtypes. Loads
and stores are of 16 bytes: a launcher hands over no row that starts elsewhere, see ``aligned``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from spectral_fast.kernels.gpu import INTERPRETED

# Triton's interpreter truncates where it should round to bfloat16, and multiplies matrices of it wrongly.
_INTERPRETED = tl.constexpr(INTERPRETED)


def is_aligned(x: Tensor) -> bool:
    """Whether every row of x (2-D) starts at a multiple of 16 bytes, without gaps between rows."""
    return x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0 and x.is_contiguous()


def aligned(x: Tensor) -> Tensor:
    """The matrix itself, or a copy that is aligned, with zeros in up to 7 columns more."""
    return x if is_aligned(x) else pad(x, (0, -x.shape[1] % 8)).clone(memory_format=torch.contiguous_format)


def table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(len(rows), columns) int64 on a device, without waiting for it. The caller keeps what it points to alive."""
    host = torch.tensor(rows, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def current(device: torch.device) -> Any:
    """Launches go to the current device: within this context, this one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@triton.jit
def pointer(address, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """An aligned address as a pointer."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def from_bfloat16(x):  # type: ignore[no-untyped-def]
    """Bfloat16 to float32; Triton's interpreter would lose the subnormal ones."""
    if _INTERPRETED:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def load(address, offsets, mask, code, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements as TYPE, float32 or float64; float64 elements as float64 only. Zero where masked."""
    if code == 0:
        x = from_bfloat16(tl.load(pointer(address, tl.bfloat16) + offsets, mask=mask, other=0.0)).to(TYPE)
    elif code == 1:
        x = tl.load(pointer(address, tl.float16) + offsets, mask=mask, other=0.0).to(tl.float32).to(TYPE)
    elif code == 2 or tl.float32 == TYPE:
        x = tl.load(pointer(address, tl.float32) + offsets, mask=mask, other=0.0).to(TYPE)
    else:
        x = tl.load(pointer(address, tl.float64) + offsets, mask=mask, other=0.0).to(TYPE)
    return x


@triton.jit
def to_bfloat16(x):  # type: ignore[no-untyped-def]
    """Float32 to bfloat16, to nearest, ties to even."""
    if _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        y = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


@triton.jit
def is_finite(x):  # type: ignore[no-untyped-def]
    """Whether all elements are finite."""
    if x.dtype == tl.bfloat16:
        x = from_bfloat16(x)
    return tl.min((tl.abs(x) < float("inf")).to(tl.int32)) != 0


@triton.jit
def store(address, offsets, x, mask, code):  # type: ignore[no-untyped-def]
    """Stores float32 or float64 elements in the code's dtype, rounded by way of float32; whether all are finite."""
    if code == 0:
        b = to_bfloat16(x.to(tl.float32))
        tl.store(pointer(address, tl.bfloat16) + offsets, b, mask=mask)
        finite = is_finite(b)
    elif code == 1:
        h = x.to(tl.float32).to(tl.float16)
        tl.store(pointer(address, tl.float16) + offsets, h, mask=mask)
        finite = is_finite(h)
    elif code == 2:
        f = x.to(tl.float32)
        tl.store(pointer(address, tl.float32) + offsets, f, mask=mask)
        finite = is_finite(f)
    else:
        d = x.to(tl.float64)
        tl.store(pointer(address, tl.float64) + offsets, d, mask=mask)
        finite = is_finite(d)
    return finite

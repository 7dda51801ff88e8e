"""The same SVD by the CUDA kernel of csrc/cuda/jacobi.cu, where ``SPECTRAL_FAST_CUDA`` names the library that holds it.

``make cuda`` builds that library with nvcc; nothing else needs it.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from spectral_fast.kernels import gpu

ENVIRONMENT_VARIABLE = "SPECTRAL_FAST_CUDA"
# Four elements of a column in each lane of a warp.
MAX_RANK = 128
# What `make cuda` compiles for; the host's library, behind its shim, has no limits.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def chosen(x: Tensor) -> bool:
    """Whether the kernel is to be used for these matrices (batch, r, r): G and V must fit into shared memory."""
    r = x.shape[-1]
    if not os.environ.get(ENVIRONMENT_VARIABLE) or r > MAX_RANK:
        return False
    arch = gpu.architecture(x.device)
    # As Shared::bytes in csrc/cuda/jacobi.cu.
    needed = (2 * r * (r | 1) + 2 * r) * x.element_size() + 4 * r
    return arch in ARCHITECTURES and needed <= gpu.ARCHITECTURES[arch].shared


@cache
def _library(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def svd_launch(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `gpu.svd_launch`, for r from 1 to 128.

    Raises:
        RuntimeError: CUDA does not launch the kernel, e.g. as float64 of r = 128 exceeds the shared memory.
    """
    count, r = x.shape[:2]
    library = _library(os.environ[ENVIRONMENT_VARIABLE])
    launch = library.spectral_fast_svd_float if x.dtype == torch.float32 else library.spectral_fast_svd_double
    x = x.contiguous()
    u, s, vh = torch.empty_like(x), x.new_empty(count, r), torch.empty_like(x)
    status = torch.empty(count, dtype=torch.int32, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        pointers = [ctypes.c_void_p(y.data_ptr()) for y in (x, u, s, vh, status)]
        error = launch(*pointers, count, r, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"the CUDA kernel was not launched for {x.dtype} matrices of r = {r}: error {error}")
    return u, s, vh, status

"""What every op needs to hand tensors to the native module: codes, addresses, and reasons to refuse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectral_fast.backends import native_missing

# The values of DType in csrc/kernels.h.
CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def refuses(tensors: Iterable[Tensor] = ()) -> str | None:
    """Wants the native module, and tensors in host memory; called without tensors it answers for this machine."""
    elsewhere = {str(x.device) for x in tensors if not x.is_cpu}
    return f"tensors are on {', '.join(sorted(elsewhere))}" if elsewhere else native_missing()


def readable(x: Tensor) -> Tensor:
    """The same values as the native module reads them: contiguous, not negated lazily; where they lie if they are."""
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def table(rows: Sequence[Sequence[int]], columns: int) -> NDArray[np.int64]:
    """Tasks as the native module takes them: (len(rows), columns) int64. The caller keeps the tensors alive."""
    return np.array(rows, dtype=np.int64).reshape(len(rows), columns)

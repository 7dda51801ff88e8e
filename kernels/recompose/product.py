"""What is asked for, as every backend takes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """One product to form: out ← basis @ T, or Tᵀ @ basis for a flat basis, with T = transform · diag(scale).

    Attributes:
        basis: tall (length, k), or flat (k, length): bfloat16, float16, float32 or float64.
        transform: (k, r), float64.
        scale: (r,), float64.
        out: (length, r), or (r, length): contiguous, any of these dtypes; may be `basis` itself.
        flat: which of the two.
        wide: sums in float64 rather than float32.
    """

    basis: Tensor
    transform: Tensor
    scale: Tensor
    out: Tensor
    flat: bool
    wide: bool

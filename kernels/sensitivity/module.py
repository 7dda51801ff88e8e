"""What is given of a module, as every backend takes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Module(NamedTuple):
    """What a module saw, and its singular vectors.

    In the basis of its LoRA factors B and A the same sums come from far smaller tensors: with U = B T_B and V = Aᵀ T_A,
    x V = (A x) T_A, so A x, Bᵀ dy, T_B and T_Aᵀ take the places of x, dy, u and vh, and r that of n and m.

    Attributes:
        x: inputs, (tokens, n): bfloat16, float16, float32 or float64.
        dy: gradients of the outputs, (tokens, m), the dtype of x.
        u: left singular vectors, (m, r), the dtype of x or wider (T_B is best kept in float32).
        vh: right singular vectors as rows, (r, n), the dtype of u.
    """

    x: Tensor
    dy: Tensor
    u: Tensor
    vh: Tensor

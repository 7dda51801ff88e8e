"""The definition: two QR factorizations and the SVD of their r × r core, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Factored(NamedTuple):
    """U = basis_b @ t_b and V = basis_aᵀ @ t_a: each side as a tall basis times a small transform.

    Attributes:
        basis_b: (m, k), either B itself, in its own dtype, or an orthonormal basis of its columns in float64.
        t_b: (k, r) float64.
        s: (r,) float64, descending, not negative.
        t_a: (k', r) float64.
        basis_a: (k', n), either A itself or an orthonormal basis of its rows.
        amplification: how large the terms of basis_b @ t_b and basis_aᵀ @ t_a may be, where the columns of U and V
            have length 1: the largest √Σ_i d_i² t_ik², d_i the length of the basis' column i. Rounding in these
            products is likely to be so much larger.
    """

    basis_b: Tensor
    t_b: Tensor
    s: Tensor
    t_a: Tensor
    basis_a: Tensor
    amplification: float = 1.0


def factor(b: Tensor, a: Tensor, name: str) -> Factored:
    """The SVD of one b @ a; where r > min(m, n) the surplus directions have s = 0 and a zero vector."""
    for x, which in ((b, "B"), (a, "A")):
        # One pass without a temporary: a NaN makes both extremes NaN, an infinity is one of them.
        if x.numel() and not torch.stack(torch.aminmax(x)).isfinite().all():
            raise not_finite(name, which)
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    core = r_b @ r_a.mT
    if not core.isfinite().all():
        raise ValueError(f"{name}: the product of B and A is beyond the range of float64; make the factors smaller")
    w, s, zh = torch.linalg.svd(core, full_matrices=False)
    surplus = (0, b.shape[1] - s.shape[0])
    return Factored(q_b, pad(w, surplus), pad(s, surplus), pad(zh.mT, surplus), q_a.mT)


def lowrank_svd(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str]) -> list[Factored]:
    """The SVD of each product b @ a."""
    return [factor(b, a, name) for b, a, name in zip(bs, as_, names, strict=True)]


def not_finite(name: str, factor: str) -> ValueError:
    """The error for a module whose factor "A" or "B" cannot be used."""
    return ValueError(f"{name}: {factor} holds a NaN or an infinity; the adapter's file or its training is broken")

"""The Gram route, whoever walks it: which modules may take it, and which are done again by QR.

Squaring a factor squares its condition number, so each result comes with an estimate of the orthogonality
that was lost, and a module that lost too much (B = 0, a dead rank, duplicated columns) is done again by QR. So is one
that holds a NaN or an infinity, which loses everything: the QR names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_fast.kernels.lowrank_svd.reference import Factored

# The loss ‖UᵀU − I‖_F that is accepted, per direction: LAPACK's test ratio of 1, in units of float32, where
# the contract allows 30.
ACCEPTED_LOSS = torch.finfo(torch.float32).eps


class Solved(NamedTuple):
    """What Gram matrices give of some modules, one after the other.

    Attributes:
        solutions: s (r,), T_B (r, r) and T_A (r, r), float64, with U = B T_B and V = Aᵀ T_A.
        quality: an estimate of max(‖UᵀU − I‖_F, ‖VᵀV − I‖_F), infinite where a step failed, and the amplification
            of `Factored`.
    """

    solutions: Iterable[tuple[Tensor, Tensor, Tensor]]
    quality: Sequence[Sequence[float]]


def lowrank_svd(
    bs: Sequence[Tensor],
    as_: Sequence[Tensor],
    names: Sequence[str],
    solve: Callable[[Sequence[Tensor], Sequence[Tensor]], Solved],
    by_qr: Callable[[Tensor, Tensor, str], Factored],
) -> list[Factored]:
    """The SVD of each b @ a; B and A themselves are the bases wherever their condition allows it."""
    # Gram matrices of float64 factors would be accurate to float32 only: those take the QR.
    narrow = [i for i, (b, a) in enumerate(zip(bs, as_, strict=True)) if torch.float64 not in (b.dtype, a.dtype)]
    solved = solve([bs[i] for i in narrow], [as_[i] for i in narrow])
    results: list[Factored | None] = [None] * len(bs)
    for i, (s, t_b, t_a), (loss, amplification) in zip(narrow, *solved, strict=True):
        if loss <= ACCEPTED_LOSS * bs[i].shape[1]:
            results[i] = Factored(bs[i], t_b, s, t_a, as_[i], amplification)
    return [done or by_qr(b, a, name) for done, b, a, name in zip(results, bs, as_, names, strict=True)]

"""What this machine allows: bytes per second of a copy, floating-point operations per second of a product."""

from __future__ import annotations

from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.cases import Adapter, Cores
from benchmarks.timing import interleave

SIDE = 2048  # of the square product: larger is no faster


def bandwidth(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Bytes per second, read and written, of copying all sources of (destination, source)."""

    def copy() -> None:
        for destination, source in pairs:
            destination.copy_(source)

    copy()
    moved = 2 * sum(source.nbytes for _, source in pairs)
    return moved / median(interleave({"copy": copy}, rounds=9, budget=2)["copy"])


def peak(*dtypes: torch.dtype) -> float:
    """Operations per second of a large matrix product, in that dtype which is fastest."""
    seconds = []
    for dtype in dtypes:
        x, y = torch.randn(2, SIDE, SIDE).to(dtype)
        out = torch.mm(x, y)
        runs = {"mm": partial(torch.mm, x, y, out=out)}
        seconds.append(median(interleave(runs, rounds=9, budget=2)["mm"]))
    return 2 * SIDE**3 / min(seconds)


def rebuild_work(case: Adapter) -> tuple[int, int]:
    """(bytes, flops) that an SVD and rebuild cannot avoid: factors read twice and written once.

    Per factor of length l the half of a Gram matrix, l r², and a product with an r × r matrix, 2 l r²; what
    is done to r × r matrices is left out.
    """
    lengths = sum(m + n for m, n in case.shapes().values())
    return 3 * case.nbytes, 3 * lengths * case.rank**2


def svd_work(case: Cores) -> tuple[int, int]:
    """(bytes, flops) of U, s and Vᵀ: 21 r³, Golub and Van Loan's count for square matrices (Matrix Computations)."""
    r = case.rank
    return case.count * (3 * r * r + r) * 8, case.count * 21 * r**3

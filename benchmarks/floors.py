"""What this machine allows: bytes per second of a copy, floating-point operations per second of a product."""

from __future__ import annotations

from functools import partial
from statistics import median

import torch
from torch import Tensor

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

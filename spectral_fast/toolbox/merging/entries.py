"""One matrix made of several, entry by entry: sparsified, then summed, or averaged where signs agree.

TIES (Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023): the largest entries of
each task's matrix are kept, each entry's sign is elected, and those that have it are averaged. DARE (Yu et al.,
"Language Models are Super Mario", ICML 2024): entries are dropped at random and the others divided by the density. As
in PEFT 0.21, signs are elected before weights are applied, and the mean is of weighted entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_fast.toolbox.merging.options import Method

Draw = Callable[[Tensor], Tensor]  # for a matrix a mask of its entries, 1 or 0, in its dtype


class Combined(NamedTuple):
    """The merged matrix, and the share of entries left by sparsification that have the elected sign; None: no vote."""

    matrix: Tensor
    agreement: float | None


def drawing(density: float, generator: torch.Generator) -> Draw:
    """Masks drawn one after the other, as PEFT draws them from a generator in the same state."""
    return lambda x: torch.bernoulli(torch.full_like(x, density), generator=generator)


def combine(
    matrices: Sequence[Tensor], weights: Sequence[float], how: Method, density: float, sign: str, draw: Draw
) -> Combined:
    """Combine matrices of one shape.

    Args:
        matrices: one per task.
        weights: what each is multiplied by, after signs are elected.
        how: what to leave out, and whether signs are elected.
        density: share of entries that stay.
        sign: "total" for the sign of the sum, "frequency" for the more frequent one; a draw is positive or, in bases
            of singular vectors, has the sign of the sum.
        draw: gives the masks of a random sparsification, called once per matrix, in order.
    """
    if how.sparsify and density < 1:
        random = how.sparsify == "random"
        matrices = [x * draw(x) / density if random else x * _largest(x, density) for x in matrices]
    stacked = torch.stack(list(matrices))
    weighted = stacked * stacked.new_tensor(weights).view(-1, *[1] * (stacked.ndim - 1))
    if not how.elect:
        return Combined(weighted.sum(0), None)
    signs = stacked.sign()
    votes = (stacked if sign == "total" else signs).sum(0)
    if how.space in ("core", "knots"):  # signs of singular vectors are arbitrary: "positive" would be by chance
        votes = votes + stacked.sum(0).sign() / 2
    agree = signs == torch.where(votes >= 0, 1, -1)
    count = agree.sum(0)
    cast = int(signs.count_nonzero())
    merged = (weighted * agree).sum(0) / count.clamp(min=1)
    return Combined(merged, int(count.sum()) / cast if cast else 1.0)


def _largest(x: Tensor, density: float) -> Tensor:
    """1 for the largest entries by magnitude, ⌊density · entries⌋ of them, 0 for the others."""
    mask = torch.zeros_like(x).reshape(-1)
    mask[x.abs().reshape(-1).topk(int(density * x.numel())).indices] = 1
    return mask.reshape(x.shape)

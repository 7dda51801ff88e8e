"""One matrix made of several, entry by entry: sparsified, then summed, or averaged where signs agree.

TIES (Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023): the largest entries of
each task's matrix are kept, each entry's sign is elected, and those that have it are averaged. DARE (Yu et al.,
"Language Models are Super Mario", ICML 2024): entries are dropped at random and the others divided by the density. As
in PEFT 0.21, signs are elected before weights are applied, and the mean is of weighted entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_fast.toolbox.merging.options import Method

Draw = Callable[[Tensor], Tensor]  # for matrices (modules, p, q) a bool mask of their entries


class Combined(NamedTuple):
    """The merged matrices (modules, p, q), and of each the share of votes for the elected signs; None: no election."""

    matrices: Tensor
    agreements: Sequence[float | None]


def combine(
    matrices: Sequence[Tensor],
    weights: Tensor,
    sizes: Sequence[int] | None,
    *,
    how: Method,
    density: float,
    sign: str,
    draw: Draw,
) -> Combined:
    """Combine matrices of one shape, of many modules at once.

    Args:
        matrices: (modules, p, q) of each task.
        weights: (tasks, modules, 1, 1), what each is multiplied by, after signs are elected.
        sizes: of each module, how many entries are meant by all, where others are zero; None: all are meant.
        how: what to leave out, and whether signs are elected.
        density: share of entries that stay.
        sign: "total" for the sign of the sum, "frequency" for the more frequent one; a draw is positive or, in bases
            of singular vectors, has the sign of the sum.
        draw: gives the masks of a random sparsification, called once per task, in order.
    """
    if how.sparsify == "random" and density < 1:
        matrices = [x * draw(x) / density for x in matrices]
    elif how.sparsify and density < 1:
        matrices = [x * _largest(x, density, sizes) for x in matrices]
    stacked = torch.stack(list(matrices))
    weighted = stacked * weights.to(stacked)
    if not how.elect:
        return Combined(weighted.sum(0), [None] * stacked.shape[1])
    total = stacked.sum(0)
    votes = total if sign == "total" else stacked.sign().sum(0)
    if how.space in ("core", "knots"):  # signs of singular vectors are arbitrary: "positive" would be by chance
        votes = votes + total.sign() / 2
    elected = 2 * (votes >= 0).to(stacked) - 1
    agree = (stacked * elected > 0).to(stacked)
    count = agree.sum(0)
    merged = (weighted * agree).sum(0) / count.clamp(min=1)
    cast = (stacked != 0).to(stacked).sum(0)
    shares = count.double().sum((1, 2)) / cast.double().sum((1, 2))
    return Combined(merged, shares.nan_to_num(1.0).tolist())


def _largest(x: Tensor, density: float, sizes: Sequence[int] | None) -> Tensor:
    """Of each matrix the largest entries by magnitude, ⌊density · entries⌋ of them; zeros are kept or not."""
    flat = x.abs().flatten(1)
    n = flat.shape[1]
    counts = torch.tensor([int(density * size) for size in sizes or [n] * len(flat)])
    places = (n - counts).clamp(max=n - 1)  # of the least that is kept, in ascending order
    ordered = torch.from_numpy(np.partition(flat.numpy(), np.unique(places).tolist(), axis=1))
    least = ordered.gather(1, places[:, None])
    del ordered
    kept = (flat >= least) & (counts > 0)[:, None]
    equal = (kept.sum(1) > counts) & (least[:, 0] > 0)
    if equal.any():  # to the least that is kept: then those stay that PEFT keeps, whose topk takes 2 to 6 times as long
        kept[equal] = _as_topk(flat[equal], counts[equal])
    return kept.view(x.shape)


def _as_topk(flat: Tensor, counts: Tensor) -> Tensor:
    most, least = int(counts.max()), int(counts.min())
    found = flat.topk(most, sorted=least < most).indices  # to sort takes three times as long
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, found, torch.arange(most) < counts[:, None])

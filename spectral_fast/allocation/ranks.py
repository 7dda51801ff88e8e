"""Scores of layers to LoRA ranks: which layers are adapted, with how many directions each, within a budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spectral_fast.allocation.layers import Layer
from spectral_fast.allocation.options import RankOptions
from spectral_fast.allocation.tail import EPS, Floats
from spectral_fast.calibration.model import PEFT_PREFIX
from spectral_fast.sensitivity import Sensitivity

TOLERANCE = 0.01  # of the budget
_SHAPES: Mapping[str, Any] = {"linear": lambda s: s, "log": np.log1p, "sqrt": np.sqrt}


def spectral_scores(alphas: Floats, spikes: Floats, options: RankOptions) -> dict[str, Floats]:
    """hill_weight · alpha, normalised, + mp_spikes_weight · (1 - spikes, normalised), with the two terms.

    A heavy tail (small alpha) and many spikes are the marks of a layer that is trained well, so that a high score is
    that of a layer with most left to learn.

    Args:
        alphas: (layers,) tail exponents.
        spikes: (layers,) eigenvalues beyond the bulk.
        options: the weights.
    """
    alpha, spike = normalised(alphas), 1 - normalised(spikes)
    score = options.hill_weight * alpha + options.mp_spikes_weight * spike
    return {"alpha_hill_normalized": alpha, "num_spikes_normalized": spike, "weighted_score": score}


def sensitivity_scores(sensitivity: Sensitivity) -> dict[str, dict[str, float]]:
    """Module name -> what its directions matter together, from a file of `probe`.

    The score is Σ_k |s_k g_k|. To first order s_k g_k is by how much the loss changes if singular direction k of the
    adapter is taken away (the importance of AdaLoRA and of Taylor pruning), so the sum bounds what the module's update
    is worth. Modules whose update is worth more get more directions. `directions` is the participation ratio
    (Σ|s g|)² / Σ|s g|², how many directions share that worth: where it is near the rank of the probed adapter, that
    rank was the limit.
    """
    found = {}
    for name, module in sensitivity.modules.items():
        worth = (module.s * module.g).abs().numpy()
        total = float(worth.sum())
        directions = total**2 / float((worth**2).sum()) if total else 0.0
        found[name.removeprefix(PEFT_PREFIX)] = {"sensitivity": total, "directions": directions}
    return found


def select(scores: Floats, options: RankOptions) -> list[int]:
    """Indices of the layers that get a rank: int(layers · percentile) of them, the first where scores are equal.

    Raises:
        ValueError: that is none.
    """
    count = int(len(scores) * options.layer_selection_percentile)
    if not count:
        raise ValueError(
            f"layer_selection_percentile {options.layer_selection_percentile:g} of {len(scores)} layers is none; with "
            f"{1 / max(1, len(scores)):.3g} or more at least one is adapted"
        )
    order = np.argsort(-scores if options.select == "largest" else scores, kind="stable")
    return sorted(int(i) for i in order[:count])


def ranks_of(scores: Floats, costs: Sequence[int], options: RankOptions, budget: int | None = None) -> list[int]:
    """Ranks of the selected layers.

    Between minimum_rank for the lowest and maximum_rank for the highest score, linear in the score, in log(1 + score)
    or in its square root; rounded half to even. With a budget those ranks, before they are rounded, are multiplied by
    the one number with which it is met, and stay within the two bounds.

    Args:
        scores: (selected,), none below zero.
        costs: parameters per rank of each.
        options: bounds and scaling.
        budget: parameters of all together.

    Raises:
        ValueError: no ranks within the bounds meet the budget to 1 %.
    """
    low, high = options.minimum_rank, options.maximum_rank
    shaped = _SHAPES[options.rank_scaling_method](scores)
    wanted = low + (high - low) * (shaped - shaped.min()) / (shaped.max() - shaped.min() + EPS)
    if budget is None:
        return [int(r) for r in np.clip(np.round(wanted), low, high)]
    return _within(wanted, np.asarray(costs), low, high, budget)


def _within(wanted: Floats, costs: Any, low: int, high: int, budget: int) -> list[int]:
    """Multiples of the wanted ranks that meet the budget."""
    least, most = int(low * costs.sum()), int(high * costs.sum())
    if least > budget * (1 + TOLERANCE) or most < budget * (1 - TOLERANCE):
        raise ValueError(
            f"a budget of {budget:,} parameters cannot be met: the {len(costs)} selected layers take {least:,} with "
            f"minimum_rank {low} and {most:,} with maximum_rank {high}; change one of the two, or how many are selected"
        )
    budget_now = min(max(budget, least), most)

    def scaled(factor: float) -> Floats:
        return np.clip(wanted * factor, low, high)

    below, above = 0.0, high / float(wanted.min())
    for _ in range(200):  # float64 is exhausted long before
        middle = (below + above) / 2
        below, above = (middle, above) if (np.floor(scaled(middle)) * costs).sum() <= budget_now else (below, middle)
    exact = scaled(below)
    ranks = np.floor(exact).astype(int)
    # One more, first where the most was cut off, as long as it comes nearer.
    for i in np.argsort(ranks - exact, kind="stable"):
        gap = budget_now - int((ranks * costs).sum())
        if ranks[i] < high and abs(gap - costs[i]) < abs(gap):
            ranks[i] += 1
    _exchange(ranks, exact, costs, low, high, budget_now)
    total = int((ranks * costs).sum())
    if abs(total - budget) > TOLERANCE * budget:
        raise ValueError(
            f"a budget of {budget:,} parameters cannot be met to {TOLERANCE:.0%} with whole ranks: the nearest found "
            f"has {total:,} (a rank costs {costs.min():,} to {costs.max():,}); change the budget"
        )
    return [int(r) for r in ranks]


def _exchange(ranks: Any, exact: Floats, costs: Any, low: int, high: int, budget: int) -> None:
    """Where the budget is missed by more than it may be: the fewest steps by one, up and down, that meet it.

    Which layers of one cost take the steps does not matter to the sum: those do that come nearest to what they should
    have. Steps can be put in an order in which the gap never exceeds the largest cost, so that no others are looked at.
    """
    kinds = sorted({int(c) for c in costs})
    start = budget - int((ranks * costs).sum())
    steps = {start: tuple(0 for _ in kinds)}  # gap -> steps of each kind that lead to it
    waiting, best = deque([start]), start
    least = [int((low - ranks[costs == c]).sum()) for c in kinds]
    most = [int((high - ranks[costs == c]).sum()) for c in kinds]
    while waiting and abs(best) > TOLERANCE * budget:
        gap = waiting.popleft()
        for i, cost in enumerate(kinds):
            for step in (1, -1):
                made, number = gap - step * cost, steps[gap][i] + step
                if made in steps or abs(made) > kinds[-1] or not least[i] <= number <= most[i]:
                    continue
                steps[made] = (*steps[gap][:i], number, *steps[gap][i + 1 :])
                waiting.append(made)
                best = min(best, made, key=abs)
    for cost, number in zip(kinds, steps[best], strict=True):
        step = 1 if number > 0 else -1
        for _ in range(abs(number)):
            free = (costs == cost) & (ranks < high if number > 0 else ranks > low)
            ranks[np.where(free, step * (ranks - exact), np.inf).argmin()] += step


def budget_of(layers: Sequence[Layer], options: RankOptions) -> int | None:
    """Parameters that the adapter shall have; None if that is left open.

    Args:
        layers: all that there are to choose among.
        options: the budget, in parameters or as a uniform rank.
    """
    if options.budget_uniform_rank is None:
        return options.budget_params
    return options.budget_uniform_rank * sum(layer.cost for layer in layers)


def normalised(x: Floats) -> Floats:
    """To [0, 1], by smallest and largest."""
    found: Floats = (x - x.min()) / (x.max() - x.min() + EPS)
    return found

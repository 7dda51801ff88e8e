"""The picture that tells whether the calibration samples were enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from torch import Tensor

from spectral_fast.report.drawing import CORE, INK, NOISE, OTHER, WIDTH, Floats, Picture
from spectral_fast.statistics import CERTAIN, SIGNIFICANT, Agreement, Stability, signal, standard_error

HALVES = "#007a5a"  # green, dark enough for a thin line on white


def stability(found: Stability) -> Picture | None:
    """Agreement of choices by number of samples; |g| with its error, and the bootstrap, in the order of |g|.

    None where there is nothing to see: fewer than 2 samples, or no direction chosen.
    """
    certain = {role: share for role, share in zip(("core", "noise"), found.certain(), strict=True) if share is not None}
    if not certain:
        return None
    figure = Figure(figsize=(WIDTH, 3.7))
    agreement, error, choice = figure.subplots(1, 3)
    _draw_agreement(agreement, found.agreement)
    _draw_error(error, found)
    _draw_choice(choice, found)
    last = found.agreement[-1]
    certainty = " and ".join(f"{share:.0%} of the {role} directions" for role, share in certain.items())
    caption = (
        "Left: the share of chosen directions that the first half of the samples has in common with all of them, and "
        "two random halves with each other. Dotted: the same if every sample's g had a random sign, which leaves no "
        f"signal; only what lies above is. With {last.samples} samples {last.doubling:.0%} and {last.halves:.0%} "
        f"agree, without signal {last.doubling_by_chance:.0%} and {last.halves_by_chance:.0%}. Middle and right: the "
        "directions of each module in the order of |g|, mean over modules. Other samples of the same kind would choose "
        f"{certainty} again with a probability above {CERTAIN:.0%} (bootstrap)."
    )
    if (p := signal(found.samples)) > SIGNIFICANT:
        caption += f" These samples do not show that g is anything but noise around zero (p = {p:.2g})."
    return Picture.of(figure, "stability", "Were the samples enough?", caption)


def _draw_agreement(ax: Any, entries: Sequence[Agreement]) -> None:
    m = [entry.samples for entry in entries]
    labels = {"doubling": "first half with all", "halves": "two random halves"}
    for (name, label), colour, marker in zip(labels.items(), (INK, HALVES), "os", strict=True):
        shares = [getattr(entry, name) for entry in entries]
        chance = [getattr(entry, f"{name}_by_chance") for entry in entries]
        ax.plot(m, shares, marker=marker, ms=4, mew=0, color=colour, lw=1.5, clip_on=False, label=label, zorder=3)
        ax.plot(m, chance, ":", color=colour, lw=1.3, label="… without signal")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator([entry.samples for entry in entries[::-2]]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_xlabel("samples")
    ax.set_title("agreement of choices", loc="left")
    _percent(ax.yaxis)
    ax.set_ylim(0, 1)
    _legend(ax)


def _draw_error(ax: Any, found: Stability) -> None:
    """Mean over modules of |g| / mean |g|, and of its standard error."""
    sizes, errors = [], []
    for parts in found.samples.values():
        g = parts.double().sum(0).abs()
        order = g.argsort(descending=True, stable=True)
        unit = g.mean().item() or 1.0
        sizes.append((g / unit)[order])
        errors.append((standard_error(parts) / unit)[order])
    (edges, size), (_, error) = _mean(sizes), _mean(errors)
    ax.stairs(size + error, edges, baseline=np.maximum(size - error, 0), fill=True, color=OTHER, alpha=0.35)
    ax.stairs(size, edges, color=INK, lw=1.5, baseline=None, label="|g|")
    ax.fill_between([], [], color=OTHER, alpha=0.35, lw=0, label="± standard error")
    ax.set_ylim(0, None)
    ax.set_title("|g|, the mean of a module = 1", loc="left")
    _directions(ax)
    _legend(ax)


def _draw_choice(ax: Any, found: Stability) -> None:
    """Mean over modules of the bootstrap's probabilities, and of what was chosen."""
    for role, colour in enumerate((CORE, NOISE)):
        probabilities, chosen = [], []
        for name, parts in found.samples.items():
            g = parts.double().sum(0)
            order = g.abs().argsort(descending=True, stable=True)
            probabilities.append(found.membership[name][role][order])
            chosen.append(found.choice.choose(g)[role][order].double())
        (edges, probability), (_, choice) = _mean(probabilities), _mean(chosen)
        label = ("as core", "as noise")[role]
        ax.stairs(probability, edges, fill=True, color=colour, alpha=0.4)
        ax.stairs(probability, edges, color=colour, lw=1.5, baseline=None, label=label)
        ax.stairs(choice, edges, color=colour, lw=1.3, ls=":", baseline=None, label="… what was chosen")
    ax.set_ylim(0, 1)
    ax.set_title("chance to be chosen again", loc="left")
    _percent(ax.yaxis)
    _directions(ax)
    _legend(ax)


def _mean(vectors: Iterable[Tensor]) -> tuple[Floats, Floats]:
    """Edges from 0 to 1 and the mean of the vectors between them, each stretched to the length of the longest."""
    arrays = [vector.numpy() for vector in vectors if len(vector)]
    longest = max(map(len, arrays))
    stretched = [array[np.arange(longest) * len(array) // longest] for array in arrays]
    return np.linspace(0, 1, longest + 1), np.mean(stretched, axis=0)


def _percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _directions(ax: Any) -> None:
    ax.set_xlim(0, 1)
    ax.set_xlabel("directions, largest |g| first")
    _percent(ax.xaxis)


def _legend(ax: Any) -> None:
    ax.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), handlelength=1.8, borderpad=0, labelspacing=0.3)

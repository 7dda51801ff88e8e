"""The pictures of sensitivity: by layer and kind of module, and by singular direction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spectral_fast.report.drawing import (
    BLANK,
    CORE,
    INK,
    LETTERS,
    NOISE,
    OTHER,
    WHOLE,
    WIDTH,
    Drawn,
    Floats,
    Picture,
    short,
)

GAINS = LinearSegmentedColormap.from_list("gains", [NOISE, "#f5f5f5", CORE])


def sensitivity_by_layer(modules: Sequence[Drawn]) -> Picture:
    """Mean |g| of the modules: a row per kind, a column per layer."""
    cells = defaultdict(list)
    for m in modules:
        cells[m.place.kind, m.place.layer].append(m.g.mean())
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: -1 if layer is None else layer)
    means = np.array([[np.mean(cells.get((kind, layer), np.nan)) for layer in layers] for kind in kinds])
    positive = means[means > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    margin = max(10 * low / high, 1.0) ** 0.5  # at least a decade, lest small differences look large
    low, high = low / margin, high * margin

    width = min(WIDTH, 3.5 + 0.5 * len(layers))
    figure = Figure(figsize=(width, 1.3 + 0.32 * min(len(kinds), 20)))
    ax, bar = figure.subplots(1, 2, width_ratios=(width - 1.0, 0.13))
    image = _heat_map(ax, np.maximum(means, low), norm=LogNorm(low, high))
    figure.colorbar(image, cax=bar, label="mean |g|")
    names = ["–" if layer is None else str(layer) for layer in layers]
    across, down = -(-len(layers) // 40), -(-len(kinds) // 30)
    ax.set_xticks(range(0, len(layers), across), names[::across])
    ax.set_yticks(range(0, len(kinds), down), [short(kind) for kind in kinds[::down]], parse_math=False)
    ax.set_xlabel("layer")

    caption = "Mean |g| of each module, g being the gradient of the calibration loss by the singular values."
    if np.isnan(means).any():
        caption += " Grey: no such module."
    if None in layers:
        caption += " Modules without a layer number in their name stand at “–”."
    if len(modules) > len(cells):
        caption += " A cell that stands for several modules, such as experts, shows their mean."
    return Picture.of(figure, "sensitivity_by_layer", "Sensitivity of the modules", caption)


def sensitivity_by_direction(modules: Sequence[Drawn]) -> Picture:
    """|g| and gain s'/s: a row per singular direction, a column per module; and their means per row."""
    share, gain, core, noise = np.full((4, max(len(m.s) for m in modules), len(modules)), np.nan)
    for column, m in enumerate(modules):
        rows = slice(len(m.s))
        share[rows, column] = m.g / (m.g.max() or 1.0)
        gain[rows, column] = np.divide(m.s_new, m.s, out=np.full_like(m.s, np.nan), where=m.s > 0)
        core[rows, column], noise[rows, column] = m.core, m.noise
    extreme = np.abs(np.log(gain[gain > 0])).max(initial=0.0)
    limit = float(np.exp(np.clip(extreme, np.log(1.05), np.log(4.0))))

    width = min(WIDTH, 6.5 + 0.25 * len(modules))
    figure = Figure(figsize=(width, 6.4))
    grid = figure.subplots(2, 3, width_ratios=(width - 2.4, 1.1, 0.13))
    (upper, upper_side, upper_bar), (lower, lower_side, lower_bar) = grid
    box = (-0.5, share.shape[1] - 0.5, share.shape[0] + 0.5, 0.5)
    image = _heat_map(upper, np.maximum(share, 0.01), norm=LogNorm(0.01, 1.0), extent=box)
    figure.colorbar(image, cax=upper_bar).set_ticks([0.01, 0.1, 1.0], labels=["≤ 1%", "10%", "100%"])
    clipped = np.clip(gain, 1 / limit, limit)
    image = _heat_map(lower, clipped, norm=LogNorm(1 / limit, limit), cmap=GAINS, extent=box)
    ticks = [1 / limit, 1.0, limit]
    figure.colorbar(image, cax=lower_bar).set_ticks(ticks, labels=[f"× {tick:.2f}" for tick in ticks])
    lower_bar.minorticks_off()
    _side(upper_side, np.zeros(len(share)), np.nanmean(share, axis=1), OTHER)
    _side(lower_side, np.nanmean(noise, axis=1), np.nanmean(core, axis=1), CORE)
    upper.set_title("sensitivity |g|, as a share of the module's largest", loc="left")
    lower.set_title("gain s′ / s", loc="left")
    upper_side.set_title("mean")
    lower_side.set_title("noise | core")
    figure.supylabel("singular direction, largest first", fontsize=LETTERS)
    upper.set_xticks([])
    _label_columns(lower, modules)
    for ax in upper, lower:
        ax.yaxis.set_major_locator(MaxNLocator(9, **WHOLE))
        for column in range(1, len(modules)):
            if modules[column].place.kind != modules[column - 1].place.kind:
                ax.axvline(column - 0.5, color="white", lw=1.5)

    caption = "A column is a module. Right: mean over all modules, and the share in which the row is core or noise."
    if np.isnan(gain).any():
        caption += " Grey: a singular value that is zero or, in a module of lower rank, not there."
    chosen = sum(int(m.core.sum()) for m in modules)
    if chosen:
        largest = sum(int(m.core[: m.core.sum()].sum()) for m in modules)
        chance = sum(float(m.core.sum()) ** 2 / len(m.core) for m in modules)
        caption += (
            f" Of the {chosen} core directions, {largest / chosen:.0%} are among the equally many largest of "
            f"their module; by chance it would be {chance / chosen:.0%}."
        )
    return Picture.of(figure, "sensitivity_by_direction", "Sensitivity of the singular directions", caption)


def _heat_map(ax: Any, values: Floats, **style: Any) -> Any:
    ax.set_facecolor(BLANK)
    ax.spines[:].set_visible(False)
    return ax.imshow(values, aspect="auto", interpolation="nearest", **style)


def _side(ax: Any, left: Floats, right: Floats, colour: str) -> None:
    """Beside a heat map: a bar per row to the left (noise) and to the right of zero."""
    k = np.arange(1, len(right) + 1)
    ax.barh(k, -left, height=1, color=NOISE)
    ax.barh(k, right, height=1, color=colour)
    ax.axvline(0, color=INK, lw=0.7)
    reach = max(left.max(), right.max()) or 1.0
    ends = (-reach if left.any() else 0.0, reach)
    ax.set_xlim(ends)
    ax.set_xticks(ends, [f"{abs(end):.0%}" for end in ends])
    ax.set_ylim(len(right) + 0.5, 0.5)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def _label_columns(ax: Any, modules: Sequence[Drawn]) -> None:
    """Below a heat map: layer numbers over the kinds; only the kinds, upright, where room is scarce."""
    spots = [(m.place.kind, m.place.layer) for m in modules]
    groups = [(short(kind), list(columns)) for kind, columns in groupby(range(len(spots)), lambda i: spots[i][0])]
    inch = len(modules) / (0.65 * ax.figure.get_figwidth())  # in columns
    upright = any(0.09 * inch * len(kind) > len(columns) for kind, columns in groups)
    step = next(step for step in (1, 2, 5, 10, 20, 25, 50, 100, len(spots)) if step >= 0.22 * inch)
    ticks = [
        column
        for _, columns in groups
        for column in columns[::step]
        if column == columns[0] or columns[-1] - column >= step // 2
    ]
    firsts = [next(same) for spot, same in groupby(ticks, lambda i: spots[i]) if spot[1] is not None]
    numbered = [] if upright else firsts  # one number for the experts of a layer
    ax.set_xticks(numbered, [str(spots[column][1]) for column in numbered])
    below = ax.secondary_xaxis("bottom")
    below.spines[:].set_visible(False)
    below.tick_params(length=0, labelrotation=90 if upright else 0, pad=18 if numbered else 4)
    some = groups[:: -(-len(groups) // 50)]
    centres = [(columns[0] + columns[-1]) / 2 for _, columns in some]
    below.set_xticks(centres, [kind for kind, _ in some], parse_math=False)

"""The picture of singular values before and after an edit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from spectral_fast.report.drawing import CORE, INK, LETTERS, NOISE, OTHER, WHOLE, WIDTH, Drawn, Picture, short

PANELS, COLUMNS = 12, 4
DECADES = 4  # that the axis reaches down from the largest value


def spectra(modules: Sequence[Drawn]) -> Picture:
    """Singular values s and s' in order, one panel per module, for up to 12 modules spread over the list."""
    chosen = np.linspace(0, len(modules) - 1, min(PANELS, len(modules))).round().astype(int)
    shown = [modules[i] for i in chosen]
    values = np.concatenate([[*m.s, *m.s_new] for m in shown])
    top = values.max() or 1.0
    bottom = max(values[values > 0].min(initial=top), top / 10**DECADES)
    logarithmic = top > 5 * bottom
    floor = bottom / 1.3 if logarithmic else 0.0

    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(0.6, columns / COLUMNS) * WIDTH, 0.9 + 1.9 * rows))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel, m in zip(grid.flat, shown, strict=False):
        k = np.arange(1, len(m.s) + 1)
        before, after = np.maximum(m.s, floor), np.maximum(m.s_new, floor)
        size = np.clip(100 / len(k), 2, 4.5)
        panel.vlines(k, before, after, color=OTHER, lw=0.7)
        panel.plot(k, before, "_", color=INK, ms=size + 2, clip_on=False)
        roles = (~(m.core | m.noise), "o", OTHER), (m.core, "o", CORE), (m.noise, "D", NOISE)
        for role, marker, colour in roles:
            if role.any():  # an empty unclipped line would confuse matplotlib's layout
                panel.plot(k[role], after[role], marker, color=colour, ms=size, mew=0, clip_on=False, zorder=3)
        panel.set_title(short(m.place.label), parse_math=False)
        panel.set_xlim(0.2, len(k) + 0.8)
        panel.xaxis.set_major_locator(MaxNLocator(5, **WHOLE))
    for panel in grid.flat[len(shown) :]:
        panel.remove()
    shared = grid[0, 0]
    if logarithmic:
        shared.set_yscale("log")
        shared.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 50 * bottom else (1,)))
        shared.yaxis.set_major_formatter("{x:g}")
        shared.yaxis.set_minor_locator(NullLocator())
    shared.set_ylim(floor, top * 1.15)
    figure.supxlabel("singular direction, largest first", fontsize=LETTERS)
    figure.supylabel("singular value", fontsize=LETTERS)
    legend = [
        Line2D([], [], ls="", marker="_", color=INK, ms=8, mew=1.2, label="before"),
        Line2D([], [], ls="", marker="o", color=CORE, ms=6, mew=0, label="after: core"),
        Line2D([], [], ls="", marker="D", color=NOISE, ms=5, mew=0, label="after: noise"),
        Line2D([], [], ls="", marker="o", color=OTHER, ms=6, mew=0, label="after: all others"),
    ]
    figure.legend(handles=legend, loc="outside upper left", ncols=4, handletextpad=0.1, columnspacing=1.5)

    caption = "Each mark is one singular value; the line from before to after is what the edit did to it."
    if len(shown) < len(modules):
        caption += f" Shown are {len(shown)} of {len(modules)} modules, spread over kinds and depth."
    if logarithmic and (values < bottom).any():
        caption += f" Values that are zero or below {bottom:.1g} stand on the lower edge."
    return Picture.of(figure, "spectra", "Singular values before and after", caption)

"""The picture of an adapter's spectra: norms and ranks by depth, and the spectra themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spectral_fast.report.drawing import COLOURS, LETTERS, MARKS, STYLE, WHOLE, WIDTH, Picture, short
from spectral_fast.report.names import places
from spectral_fast.toolbox.inspection import Inspected

DECADES = 5  # that spectra reach down from their largest value
LINES = 400  # more spectra than these are one blot
PANELS = {
    "frobenius": "Frobenius norm of ΔW",
    "effective_rank": "effective rank of ΔW",
    "rank_95": "directions with 95 % of Σ s²",
}


def inspection_picture(found: Mapping[str, Inspected]) -> Picture:
    """Norm, effective rank and rank at 95 % by depth, and s over its largest; a colour per kind of module.

    Args:
        found: from `inspect_adapter`, not empty.
    """
    where = places(found)
    kinds = list(dict.fromkeys(place.kind for place in where.values()))
    looks: dict[str, dict[str, Any]] = {
        kind: {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i // len(COLOURS) % len(MARKS)]}
        for i, kind in enumerate(kinds)
    }
    depths = [place.layer for place in where.values() if place.layer is not None]
    beyond = max(depths, default=-1) + 1  # the place of modules outside of the numbered layers
    rows = {name: x.row() for name, x in found.items()}
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 6.4))
        grid = figure.subplots(2, 2)
        for panel, (key, label) in zip(grid.flat, PANELS.items(), strict=False):
            for kind, look in looks.items():
                some = [name for name in found if where[name].kind == kind and rows[name][key] is not None]
                layers = [where[name].layer for name in some]
                x = [beyond if layer is None else layer for layer in layers]
                alone = len(set(x)) == len(x)  # experts of a layer are points, one above the other
                panel.plot(x, [rows[name][key] for name in some], **look, ms=3.5, lw=0.8 * alone)
            panel.set_ylabel(label, parse_math=False)
            panel.set_ylim(bottom=0)
            panel.xaxis.set_major_locator(MaxNLocator(10, **WHOLE))
            panel.set_xlabel("layer" + f" ({beyond}: outside of the numbered ones)" * (len(depths) < len(where)))
        spectra = grid[1, 1]
        names = list(found)
        chosen = np.linspace(0, len(names) - 1, min(LINES, len(names))).round().astype(int)
        least = 1.0
        for name in (names[i] for i in chosen):
            s = found[name].s
            if s[0] > 0:
                share = np.maximum(s / s[0], 10.0**-DECADES)
                least = min(least, float(share[-1]))
                spectra.plot(np.arange(1, len(s) + 1), share, color=looks[where[name].kind]["color"], lw=0.6, alpha=0.6)
        spectra.set_yscale("log")
        spectra.set_ylim(min(0.1, least / 1.3), 1.3)
        spectra.set_ylabel("singular value over the largest")
        spectra.set_xlabel("singular direction, largest first")
        spectra.xaxis.set_major_locator(MaxNLocator(8, **WHOLE))
        handles = [Line2D([], [], ms=4, lw=0.8, label=short(kind), **look) for kind, look in looks.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(7, len(handles)), fontsize=LETTERS)
        caption = (
            "Norm, effective rank and directions with 95 % of the energy of every module's update by depth, and the "
            "spectra themselves, each over its largest value."
        )
        if len(chosen) < len(names):
            caption += f" Of the spectra {len(chosen)} of {len(names)} are drawn, spread over the modules."
        return Picture.of(figure, "inspection", "Spectra of the adapter", caption)

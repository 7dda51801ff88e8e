"""The picture of the learned activations of an LS-LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib import colormaps, style
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spectral_fast.report.drawing import INK, LETTERS, OTHER, STYLE, WHOLE, WIDTH, Picture
from spectral_fast.report.names import places
from spectral_fast.splines import Spline, mean_facts

COLUMNS, POINTS = 4, 401


def save_spline_picture(file: Path | str, splines: Mapping[str, Spline]) -> None:
    """Write `spline_picture` as a PNG."""
    Path(file).write_bytes(spline_picture(splines).png)


def spline_picture(splines: Mapping[str, Spline]) -> Picture:
    """What every spline adds to LoRA's output, a panel per kind of module and a line per layer.

    Args:
        splines: module -> spline, from `read_splines` or `splines_of`.

    Raises:
        ValueError: there are none.
    """
    if not splines:
        raise ValueError("a picture of splines needs at least one; got none")
    where = places(splines)
    kinds = list(dict.fromkeys(place.kind for place in where.values()))
    columns = min(COLUMNS, len(kinds))
    rows = -(-len(kinds) // columns)
    depth = Normalize(0, max(1, *(place.layer or 0 for place in where.values())))
    colours = colormaps["viridis"]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(max(0.6, columns / COLUMNS) * WIDTH, 0.9 + 2.1 * rows))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for panel, kind in zip(grid.flat, kinds, strict=False):
            mine = {name: spline for name, spline in splines.items() if where[name].kind == kind}
            for name, spline in mine.items():
                z = torch.linspace(spline.options.k_min, spline.options.k_max, POINTS)
                panel.plot(z, spline(z) - z, color=colours(depth(where[name].layer or 0)), lw=1)
            panel.axhline(0, color=OTHER, lw=0.7, ls=":")
            panel.set_title(kind, parse_math=False)
            deviation = mean_facts(mine.values())["deviation"]
            panel.text(0.04, 0.93, f"mean |v − k| {deviation:.3f}", va="top", color=INK, transform=panel.transAxes)
            panel.xaxis.set_major_locator(MaxNLocator(6))
        for panel in grid.flat[len(kinds) :]:
            panel.remove()
        figure.supxlabel("z, the output of LoRA", fontsize=LETTERS)
        figure.supylabel("what the spline adds to z", fontsize=LETTERS)
        figure.colorbar(
            ScalarMappable(depth, colours), ax=figure.axes, label="layer", ticks=MaxNLocator(**WHOLE), aspect=30
        )
        caption = (
            "What the learned spline of every adapted layer adds to the output of LoRA, which is 0 where it is the "
            "identity, with both scales; between first and last knot. In the corner: mean distance of the knots' "
            "values from the identity."
        )
        return Picture.of(figure, "splines", "Learned splines", caption)

"""Pictures of an allocation of ranks: the spectrum of every layer's weights, and exponents and ranks by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from spectral_fast.allocation import AdaptiveLora, LayerSpectrum
from spectral_fast.report.drawing import (
    COLOURS,
    CORE,
    INK,
    LETTERS,
    MARKS,
    NOISE,
    OTHER,
    STYLE,
    WHOLE,
    WIDTH,
    Picture,
    short,
)
from spectral_fast.report.names import Place, places

COLUMNS, ROWS = 4, 6
DECADES = 4  # that a panel's axis reaches down from the highest density
BINS = 60


def save_allocation_pictures(directory: Path | str, result: AdaptiveLora) -> list[Path]:
    """Write ranks.png and, if there are spectra, pages spectra-1.png … of 24 layers each into a folder.

    Args:
        directory: folder for them, made if missing.
        result: from `allocate` or `get_adaptive_lora_config`.

    Returns:
        The files written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for picture in allocation_pictures(result):
        files.append(directory / f"{picture.name}.png")
        files[-1].write_bytes(picture.png)
    return files


def allocation_pictures(result: AdaptiveLora) -> list[Picture]:
    """Ranks by depth, then a page of spectra for every 24 layers."""
    where = places(result.table.layer_name)
    size = COLUMNS * ROWS
    with style.context(["default", STYLE]):
        made = [_by_depth(result, where)]
        for page, first in enumerate(range(0, len(result.found), size), start=1):
            made.append(_spectra(result.found[first : first + size], where, page))
    return made


def _spectra(found: Sequence[LayerSpectrum], where: Mapping[str, Place], page: int) -> Picture:
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(max(0.6, columns / COLUMNS) * WIDTH, 0.9 + 1.9 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for panel, spectrum in zip(grid.flat, found, strict=False):
        _density(panel, spectrum)
        panel.set_title(short(where[spectrum.layer.name].label), parse_math=False)
    for panel in grid.flat[len(found) :]:
        panel.remove()
    figure.supxlabel("eigenvalue λ of the squared weights", fontsize=LETTERS)
    figure.supylabel("density", fontsize=LETTERS)
    figure.legend(
        handles=[
            Line2D([], [], color=OTHER, lw=4, label="eigenvalues"),
            Line2D([], [], color=INK, lw=1, label="Marchenko-Pastur bulk"),
            Line2D([], [], color=INK, lw=0.8, ls=":", label="its edge"),
            Line2D([], [], color=CORE, lw=1.4, label="power law"),
            Line2D([], [], ls="", marker="|", color=NOISE, ms=8, mew=1.2, label="spikes"),
        ],
        loc="outside upper center",
        ncols=5,
    )
    caption = (
        "Grey: the spectrum of each layer's weights, both axes logarithmic. Black: the bulk that a random matrix of "
        "the same size and variance has, and its edge. Orange: eigenvalues beyond it. Blue: the power law fitted to "
        "the tail, its exponent in the corner."
    )
    return Picture.of(figure, f"spectra-{page}", "Spectra of the weights", caption)


def _density(panel: Any, spectrum: LayerSpectrum) -> None:
    eigs, bulk, tail = spectrum.eigs, spectrum.bulk, spectrum.tail
    if bulk is None:
        panel.text(0.5, 0.5, "all weights are zero", ha="center", va="center", transform=panel.transAxes)
        panel.set_axis_off()
        return
    top = float(eigs[-1])
    low = max(float(eigs[eigs > 0][0]), 1e-4 * top)
    edges = np.geomspace(low, max(top, 1.2 * bulk.edge) * 1.05, BINS + 1)
    counts, _ = np.histogram(eigs, edges)
    heights = counts / (len(eigs) * np.diff(edges))
    panel.stairs(heights, edges, fill=True, color=OTHER, alpha=0.45, lw=0)
    x = np.geomspace(edges[0], edges[-1], 400)
    law = bulk.density(x)
    panel.plot(x[law > 0], law[law > 0], color=INK, lw=1)
    panel.axvline(bulk.edge, color=INK, lw=0.8, ls=":")
    highest = max(heights.max(), float(law[x > 0.05 * bulk.edge].max(initial=0)))
    if tail is not None:
        start = float(eigs[tail.start])
        x = np.geomspace(max(start, low), edges[-1], 100)
        share = (len(eigs) - tail.start) / len(eigs)
        panel.plot(x, share * (tail.alpha - 1) / start * (x / start) ** -tail.alpha, color=CORE, lw=1.4)
        panel.text(0.97, 0.93, f"α = {tail.alpha:.2f}", ha="right", va="top", color=CORE, transform=panel.transAxes)
    spikes = eigs[eigs > bulk.edge]
    if len(spikes):
        panel.plot(
            spikes, np.full(len(spikes), 0.04), "|", color=NOISE, ms=6, mew=1, transform=panel.get_xaxis_transform()
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(highest / 10**DECADES, highest * 3)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_locator(NullLocator())


def _by_depth(result: AdaptiveLora, where: Mapping[str, Place]) -> Picture:
    table = result.table
    measured = ("alpha_hill", "tail exponent α") if result.found else ("sensitivity", "Σ|s g| of the directions")
    figure = Figure(figsize=(WIDTH, 6.4))
    upper, lower = figure.subplots(2, 1, sharex=True)
    depths = [place.layer for place in where.values() if place.layer is not None]
    beyond = max(depths, default=-1) + 1  # the place of layers outside of the numbered ones
    kinds = list(dict.fromkeys(where[name].kind for name in table.layer_name))
    handles = []
    for i, kind in enumerate(kinds):
        rows = table[[where[name].kind == kind for name in table.layer_name]]
        x = [beyond if where[name].layer is None else where[name].layer for name in rows.layer_name]
        look: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKS[i // len(COLOURS) % len(MARKS)],
            "ms": 4,
            "lw": 0.8,
        }
        upper.plot(x, rows[measured[0]], **look)
        chosen = rows.rank_pattern > 0
        lower.plot(np.asarray(x)[chosen], rows.rank_pattern[chosen], **{**look, "lw": 0})
        handles.append(Line2D([], [], label=short(kind), **look))
    upper.set_ylabel(measured[1], parse_math=False)
    lower.set_ylabel("rank, of the layers that are adapted")
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_locator(MaxNLocator(8, **WHOLE))
    lower.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    lower.set_xlabel(
        "layer"
        + (f" ({beyond}: outside of the numbered ones)" if None in [place.layer for place in where.values()] else "")
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=min(7, len(handles)))
    caption = (
        f"Above: {measured[1]} of every layer by depth, a colour per kind. Below: the ranks that were given, "
        f"{result.parameters:,} parameters in all."
    )
    return Picture.of(figure, "ranks", "Exponents and ranks by depth", caption)

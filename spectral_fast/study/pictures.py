"""Figures of `predictors`: singular values, and a matrix beside its reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from spectral_fast.report.drawing import CORE
from spectral_fast.study.output import COLOURS, draw
from spectral_fast.study.reconstruction import Floats


def singular_values(path: Path, title: str, s: Floats) -> None:
    """The singular values by index, on a logarithmic axis; those that are zero are left out."""

    def fill(figure: Figure) -> None:
        panel = figure.subplots()
        positive = s[s > 0]
        panel.plot(np.arange(1, len(positive) + 1), positive, color=CORE, marker=".", ms=3, lw=0.8)
        if len(positive):
            panel.set_yscale("log")
        panel.set_title(title, parse_math=False)
        panel.set_xlabel("i")
        panel.set_ylabel("singular value")

    draw(path, (4.8, 3.4), fill)


def comparison(path: Path, title: str, panels: Mapping[str, Floats]) -> None:
    """Matrices side by side, in one scale of colours."""
    limit = max(float(np.abs(w).max()) for w in panels.values()) or 1.0

    def fill(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels))
        for panel, (name, w) in zip(axes, panels.items(), strict=True):
            image = panel.imshow(w, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="antialiased")
            panel.set_title(name, parse_math=False)
            panel.set_xticks([])
            panel.set_yticks([])
        figure.colorbar(image, ax=axes, fraction=0.02)
        figure.suptitle(title, parse_math=False)

    draw(path, (3.0 * len(panels), 3.2), fill)


def error_bars(path: Path, title: str, errors: Mapping[str, float]) -> None:
    """A bar per error."""

    def fill(figure: Figure) -> None:
        panel = figure.subplots()
        panel.bar(range(len(errors)), list(errors.values()), color=COLOURS)
        panel.set_xticks(range(len(errors)), [name.removesuffix("_err") for name in errors], rotation=30, ha="right")
        panel.set_ylabel("‖W − H‖ / ‖W‖")
        panel.set_title(title, parse_math=False)

    draw(path, (6.4, 3.8), fill)

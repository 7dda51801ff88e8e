"""What the pictures share: what they show of a module, colours, letters, and a picture with its caption."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spectral_fast.edit import EditedModule
from spectral_fast.report.names import Place

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Blue and vermilion after Okabe and Ito, told apart with any colour vision: always core and noise.
CORE, NOISE, OTHER, INK, BLANK = "#0072b2", "#d55e00", "#8c8c8c", "#222222", "#e4e4e4"
# All of theirs, and marks where there are more kinds than colours.
COLOURS = (CORE, NOISE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = "osD^v"
WIDTH = 10.0  # inches; wider, and the letters are too small in the column of a README
LETTERS = 9.5  # points
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": LETTERS,
    "axes.titlesize": LETTERS,
    "axes.labelsize": LETTERS,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}
# Keywords of MaxNLocator for ranks, which are mostly powers of two.
WHOLE: dict[str, Any] = {"integer": True, "min_n_ticks": 1, "steps": [1, 1.6, 2, 3.2, 4, 6.4, 8, 10]}


@dataclass(frozen=True, eq=False)
class Drawn:
    """One module as arrays: s, s', |g| (empty if not measured), and which directions are core and noise."""

    place: Place
    s: Floats
    s_new: Floats
    g: Floats
    core: Mask
    noise: Mask

    @classmethod
    def of(cls, module: EditedModule, place: Place) -> Drawn:
        """The arrays of an edited module."""
        g = np.empty(0) if module.g is None else module.g.abs().numpy()
        edit = module.edit
        return cls(place, module.s.numpy(), edit.s_new.numpy(), g, edit.core.numpy(), edit.noise.numpy())


@dataclass(frozen=True)
class Picture:
    """A PNG with the stem of a file name, a heading, how to read it, and its width in inches."""

    name: str
    title: str
    caption: str
    png: bytes
    width: float

    @classmethod
    def of(cls, figure: Figure, name: str, title: str, caption: str) -> Picture:
        """The figure as a picture."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return cls(name, title, caption, buffer.getvalue(), figure.get_figwidth())


def short(text: str) -> str:
    """The end of a long name."""
    return text if len(text) <= 26 else f"…{text[-25:]}"

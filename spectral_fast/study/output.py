"""What the study's commands write: tables as CSV, figures as PNG."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from spectral_fast.report.drawing import CORE, INK, NOISE, OTHER, STYLE

COLOURS = (CORE, NOISE, OTHER, INK, "#009e73", "#cc79a7")
MARKS = "os^Dvx"


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, header: bool = True) -> str:
    """The rows as CSV, floats with all their digits; a missing value is an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def draw(path: Path, size: tuple[float, float], fill: Callable[[Figure], None]) -> None:
    """A figure of that size in inches, filled and written as PNG, in the style of the reports."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=size)
        fill(figure)
        figure.savefig(path, format="png")


def file_name(parameter: str) -> str:
    """A parameter's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", parameter)

"""The report of an edit: one HTML file with pictures and tables, or the pictures alone.

The pictures use matplotlib's figures, never pyplot, and leave the program's matplotlib settings as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style

from spectral_fast.atomic import replace_file
from spectral_fast.edit import EditedModule
from spectral_fast.report.drawing import STYLE, Drawn, Picture
from spectral_fast.report.heat_maps import sensitivity_by_direction, sensitivity_by_layer
from spectral_fast.report.names import places
from spectral_fast.report.page import EvaluationRow, page
from spectral_fast.report.spectra import spectra
from spectral_fast.report.stability import stability as drawn_stability
from spectral_fast.statistics import Stability

__all__ = ["EvaluationRow", "Picture", "pictures", "save_pictures", "spectra_picture", "write_report"]


def write_report(
    path: Path | str,
    title: str,
    edited: Mapping[str, EditedModule],
    *,
    evaluation: Sequence[EvaluationRow] | None = None,
    facts: Mapping[str, Any] | None = None,
    stability: Stability | None = None,
) -> list[Picture]:
    """Write a report of an edit as one HTML file that needs no other: pictures, evaluation, facts, modules.

    The file appears when it is complete; one that was there is then replaced.

    Args:
        path: the file; missing folders are made.
        title: heading, e.g. the adapter's name and the mode.
        edited: module name -> what `edit_adapter` did to it.
        evaluation: how the adapters did, the original first.
        facts: what else a reader wants to know (mode, hyperparameters, calibration), in this order.
        stability: what the calibration samples say about the choice of directions, where g per sample was kept.

    Returns:
        The pictures in it, as `pictures` draws them.

    Raises:
        ValueError: if `edited` is empty.
    """
    drawn = pictures(edited, stability)
    text = page(title, edited, drawn, evaluation or (), facts or {})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return drawn


def save_pictures(
    directory: Path | str, edited: Mapping[str, EditedModule], stability: Stability | None = None
) -> list[Path]:
    """Write the report's pictures: spectra, sensitivity_by_layer, sensitivity_by_direction and stability, all .png.

    Args:
        directory: folder for them, made if missing.
        edited: module name -> what `edit_adapter` did to it.
        stability: as in `write_report`.

    Returns:
        The files written: only the first if the edit used no sensitivities.

    Raises:
        ValueError: if `edited` is empty.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for picture in pictures(edited, stability):
        files.append(directory / f"{picture.name}.png")
        files[-1].write_bytes(picture.png)
    return files


def pictures(edited: Mapping[str, EditedModule], stability: Stability | None = None) -> list[Picture]:
    """The spectra and, if every module has its g, two maps of |g|; and the stability of the choice, if it is given.

    Modules of rank 0 are not in them.

    Raises:
        ValueError: if `edited` is empty.
    """
    modules = _drawn(edited)
    if not modules:
        return []
    with style.context(["default", STYLE]):
        made = [spectra(modules)]
        if all(m.g.size for m in modules):
            made += [sensitivity_by_layer(modules), sensitivity_by_direction(modules)]
        if stability is not None and (picture := drawn_stability(stability)):
            made.append(picture)
    return made


def spectra_picture(edited: Mapping[str, EditedModule]) -> Picture | None:
    """The first of `pictures` alone; None if every module is of rank 0."""
    modules = _drawn(edited)
    with style.context(["default", STYLE]):
        return spectra(modules) if modules else None


def _drawn(edited: Mapping[str, EditedModule]) -> list[Drawn]:
    """The modules of positive rank by kind and layer."""
    if not edited:
        raise ValueError("a report needs at least one edited module; got none")
    found = places(edited)
    modules = [Drawn.of(module, found[name]) for name, module in edited.items() if module.s.numel()]
    kinds = list(dict.fromkeys(m.place.kind for m in modules))
    modules.sort(key=lambda m: (kinds.index(m.place.kind), -1 if m.place.layer is None else m.place.layer))
    return modules

"""Pictures of a sweep: accuracy against each hyperparameter, and all variants beside the random controls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from spectral_fast.report.drawing import CORE, INK, LETTERS, NOISE, OTHER, STYLE, WIDTH, Picture, short
from spectral_fast.sweep.analysis import Outcome, varied

COLUMNS, MOST = 3, 40


def against_hyperparameters(baseline: Outcome, variants: Sequence[Outcome]) -> Picture | None:
    """Score by each hyperparameter that has several values, a panel each; None if there is none."""
    axes = varied(outcome.run for outcome in variants)
    if not axes:
        return None
    with style.context(["default", STYLE]):
        columns = min(COLUMNS, len(axes))
        rows = -(-len(axes) // columns)
        figure = Figure(figsize=(max(0.5, columns / COLUMNS) * WIDTH, 0.8 + 2.5 * rows))
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for panel, (name, values) in zip(grid.flat, axes.items(), strict=False):
            numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
            shown = sorted(values) if numeric else values
            at = {repr(value): value if numeric else i for i, value in enumerate(shown)}
            _band(panel, baseline)
            points: dict[Any, list[Outcome]] = {}
            for outcome in variants:
                own = outcome.run.config.hyperparameters
                if name in own:
                    points.setdefault(at[repr(own[name])], []).append(outcome)
            places = sorted(at.values())
            span, gap = places[-1] - places[0], min(b - a for a, b in pairwise(places))
            for x, outcomes in points.items():
                step = min(0.02 * span, 0.6 * gap / len(outcomes))  # marks of one value stay apart from the next one's
                spread = x + step * (np.arange(len(outcomes)) - (len(outcomes) - 1) / 2)
                scores = [100 * outcome.score for outcome in outcomes]
                errors = [100 * outcome.standard_error for outcome in outcomes]
                panel.errorbar(spread, scores, errors, fmt="o", color=CORE, ms=4, lw=0.8, zorder=3)
            middle = sorted((x, float(np.mean([100 * o.score for o in some]))) for x, some in points.items())
            if numeric:
                panel.plot(*zip(*middle, strict=True), color=CORE, lw=0.8, alpha=0.6)
            else:
                panel.set_xticks(range(len(shown)), [short(_text(value)) for value in shown], rotation=20, ha="right")
                for tick in panel.get_xticklabels():
                    tick.set_parse_math(False)
            panel.set_xlabel(name, parse_math=False)
        for panel in grid.flat[len(axes) :]:
            panel.remove()
        figure.supylabel("score, %", fontsize=LETTERS)
        caption = (
            "Each mark is one variant with its standard error; a line joins the means. The grey line and band are the "
            "original adapter and its standard error. Variants in one panel may differ in other hyperparameters, too."
        )
        return Picture.of(figure, "hyperparameters", "Score against each hyperparameter", caption)


def against_controls(variants: Sequence[Outcome], controls: Sequence[Outcome]) -> Picture | None:
    """Differences to the original with intervals, for up to 40 variants, above all random controls; None if no run."""
    chosen = sorted(variants, key=_difference)[-MOST:]
    if not chosen and not controls:
        return None
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 1.2 + 0.28 * (len(chosen) + 1)))
        panel = figure.subplots()
        panel.axvline(0, color=OTHER, lw=0.8)
        for y, outcome in enumerate(chosen, start=1):
            c = outcome.comparison
            assert c is not None
            panel.hlines(y, 100 * c.interval[0], 100 * c.interval[1], color=CORE, lw=1.0)
            panel.plot(100 * c.difference, y, "o", color=CORE, ms=5)
            if outcome.yardstick is not None:
                marks = [100 * d for d in outcome.yardstick.differences]
                panel.plot(marks, [y - 0.25] * len(marks), "|", color=NOISE, ms=7, mew=1.5)
        marks = [_difference(control) for control in controls]
        panel.plot([100 * d for d in marks], [0] * len(marks), "|", color=NOISE, ms=11, mew=1.5)
        panel.set_yticks(range(len(chosen) + 1), ["random controls", *(_tick(o.label) for o in chosen)])
        for tick in panel.get_yticklabels():
            tick.set_parse_math(False)
        panel.set_xlabel("difference to the original adapter, percentage points")
        caption = (
            "Blue: a variant's difference with its 95 % interval (not corrected for their number). Orange: the "
            "random controls, all of them at the bottom, and below each variant those with its counts and factors."
        )
        if len(chosen) < len(variants):
            caption += f" Shown are the {len(chosen)} best of {len(variants)} variants."
        return Picture.of(figure, "controls", "Variants beside random edits", caption)


def _tick(label: str) -> str:
    """A label with its mode, at the start, and what follows, as far as there is room."""
    return label if len(label) <= 48 else f"{label[:16]}…{label[-31:]}"


def _band(panel: Any, baseline: Outcome) -> None:
    score, error = 100 * baseline.score, 100 * baseline.standard_error
    panel.axhspan(score - error, score + error, color=OTHER, alpha=0.15, lw=0)
    panel.axhline(score, color=INK, lw=0.8, alpha=0.5)


def _difference(outcome: Outcome) -> float:
    assert outcome.comparison is not None
    return outcome.comparison.difference


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)

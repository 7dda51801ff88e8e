"""What a run is in a table, in Markdown as on the page."""

from __future__ import annotations

from collections.abc import Mapping

from spectral_fast.sweep.analysis import Outcome

FAILED = ["run", "configuration", "error"]
HEAD = ["run", "score", "standard error", "difference (points)", "95 % interval", "p", "p (Holm)", "random controls"]
HEAD += ["verdict", "task", "adapter"]


def cells(outcome: Outcome) -> list[str]:
    """An outcome as the cells of a table, under `HEAD`."""
    config, c, y = outcome.run.config, outcome.comparison, outcome.yardstick
    numbers = ["–"] * 3
    if c is not None:
        low, high = c.interval
        numbers = [f"{100 * c.difference:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}", p_text(c.p_value)]
    return [
        outcome.label,
        f"{outcome.score:.2%}",
        f"{outcome.standard_error:.2%}",
        *numbers,
        "–" if outcome.p_holm is None else p_text(outcome.p_holm),
        "–" if y is None else f"{100 * y.differences[0]:+.2f} to {100 * y.differences[-1]:+.2f}",
        outcome.verdict or ("random control" if outcome.run.role == "control" else "–"),
        f"{config.task}, {config.metric}",
        config.label,
    ]


def failure_cells(failure: Mapping[str, str]) -> list[str]:
    """A failure as the cells of a table, under `FAILED`."""
    return [failure["label"], failure["where"], failure["error"]]


def p_text(p: float) -> str:
    """A p-value to three digits."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"

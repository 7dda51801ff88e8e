"""What the runs of a sweep say: each against the adapter as it is, all of them together, and beside random edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spectral_fast.evaluation.comparison import (
    SIGNIFICANCE,
    Comparison,
    Yardstick,
    compare,
    holm,
    spread_of_mean,
)
from spectral_fast.sweep.plan import Plan, Run


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Attributes:
        run: what was run.
        label: a short name, unique in the sweep but for the task and the adapter.
        scores: problem -> score.
        comparison: with the adapter as it is; None for that one itself.
        p_holm: p-value after Holm's correction over all variants of the sweep; None but for variants.
        yardstick: what its random controls did; None but for variants that have any.
    """

    run: Run
    label: str
    scores: Mapping[str, float]
    comparison: Comparison | None
    p_holm: float | None
    yardstick: Yardstick | None

    @property
    def score(self) -> float:
        """Mean score over problems."""
        return sum(self.scores.values()) / len(self.scores)

    @property
    def standard_error(self) -> float:
        """Of the score."""
        return spread_of_mean(list(self.scores.values()))

    @property
    def verdict(self) -> str:
        """In words; a control has none, as it is what others are measured by."""
        if self.comparison is None or self.p_holm is None:
            return ""
        difference = self.comparison.difference
        words = "not distinguishable from the original"
        if self.p_holm < SIGNIFICANCE:
            words = f"{'better' if difference > 0 else 'worse'} than the original"
        return words if self.yardstick is None else f"{words}; {self.yardstick.place(difference)['verdict']}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        place = None
        if self.comparison is not None and self.yardstick is not None:
            place = {**self.yardstick.summary(), **self.yardstick.place(self.comparison.difference)}
        return {
            "run": self.run.id,
            "label": self.label,
            "role": self.run.role,
            "score": self.score,
            "standard_error": self.standard_error,
            "n": len(self.scores),
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "p_holm": self.p_holm,
            "random_controls": place,
            "verdict": self.verdict,
        }


def analyse(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Outcome]:
    """Run id -> outcome, in the plan's order.

    Args:
        plan: what was to be run.
        records: run id -> its record in the ledger.
    """
    scores = {name: records[name]["scores"] for name in plan.runs}
    comparisons = {
        name: compare(scores[plan.baseline_of[name]], scores[name])
        for name, run in plan.runs.items()
        if run.role != "baseline"
    }
    variants = [run.id for run in plan.of_role("variant")]
    adjusted = dict(zip(variants, holm([comparisons[name].p_value for name in variants]), strict=True))
    labels = label(plan.runs.values())
    return {
        name: Outcome(
            run=run,
            label=labels[name],
            scores=scores[name],
            comparison=comparisons.get(name),
            p_holm=adjusted.get(name),
            yardstick=Yardstick.of([comparisons[control].difference for control in controls])
            if (controls := plan.controls_of.get(name))
            else None,
        )
        for name, run in plan.runs.items()
    }


def varied(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Hyperparameter -> its values, for those that have several among these runs."""
    values: dict[str, list[Any]] = {}
    for run in runs:
        for key, value in run.config.hyperparameters.items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return {key: found for key, found in values.items() if len(found) > 1}


def label(runs: Iterable[Run]) -> dict[str, str]:
    """Run id -> mode, and the hyperparameters in which runs of that mode differ."""
    by_mode: dict[str, list[Run]] = {}
    for run in runs:
        by_mode.setdefault(run.config.mode, []).append(run)
    named = {}
    for mode, alike in by_mode.items():
        differing = varied(alike)
        for run in alike:
            own = run.config.hyperparameters
            parts = [f"{key} {_short(own[key])}" for key in differing if key in own]
            named[run.id] = "original" if run.role == "baseline" else ", ".join([mode, *parts])
    return named


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)

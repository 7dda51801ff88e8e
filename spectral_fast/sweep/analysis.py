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
        comparison: with the adapter as it is; None for that one itself, and if that one failed.
        p_holm: p-value after Holm's correction over all variants of the sweep; None but for compared variants.
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
            return "not compared, as the original failed" if self.run.role == "variant" else ""
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
    """Run id -> outcome, in the plan's order, of the runs that did not fail.

    Holm's correction counts the variants that were to be run: one that failed counts as p = 1, lest failures make
    the others look better.

    Args:
        plan: what was to be run.
        records: run id -> its record in the ledger.
    """
    scores = {name: records[name]["scores"] for name in plan.runs if name in records}
    comparisons = {
        name: compare(scores[plan.baseline_of[name]], scores[name])
        for name in scores
        if plan.runs[name].role != "baseline" and plan.baseline_of[name] in scores
    }
    variants = [run.id for run in plan.of_role("variant")]
    p_values = [comparisons[name].p_value if name in comparisons else 1.0 for name in variants]
    adjusted = dict(zip(variants, holm(p_values), strict=True))
    labels = label(plan.runs.values())
    found = {}
    for name in scores:
        controls = [
            comparisons[control].difference for control in plan.controls_of.get(name, ()) if control in comparisons
        ]
        found[name] = Outcome(
            run=plan.runs[name],
            label=labels[name],
            scores=scores[name],
            comparison=comparisons.get(name),
            p_holm=adjusted.get(name) if name in comparisons else None,
            yardstick=Yardstick.of(controls) if controls else None,
        )
    return found


def varied(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Hyperparameter -> its values, for those that have several among these runs."""
    return _several(run.config.hyperparameters for run in runs)


def _several(settings: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for one in settings:
        for key, value in one.items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return {key: found for key, found in values.items() if len(found) > 1}


def label(runs: Iterable[Run]) -> dict[str, str]:
    """Run id -> mode, and the hyperparameters and the settings of the evaluation in which runs of that mode differ."""
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.config.task, run.config.mode), []).append(run)
    named = {}
    for (_, mode), some in alike.items():
        settings = {run.id: {**run.config.hyperparameters, **run.config.circumstances} for run in some}
        differing = _several(settings.values())
        for run in some:
            own = settings[run.id]
            parts = [f"{key} {_short(own[key])}" for key in differing if key in own]
            named[run.id] = ", ".join(["original" if run.role == "baseline" else mode, *parts])
    return named


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)

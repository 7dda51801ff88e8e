"""The tables of a sweep, from its ledger."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from spectral_fast.atomic import replace_file
from spectral_fast.sweep.analysis import Outcome, analyse, label
from spectral_fast.sweep.cells import FAILED, HEAD, cells, failure_cells, p_text
from spectral_fast.sweep.config import Config
from spectral_fast.sweep.ledger import Ledger
from spectral_fast.sweep.plan import Plan, Planner, Run
from spectral_fast.sweep.report import write_report
from spectral_fast.sweep.work import ADAPTER, RUNS

# The columns of the method's own collector, then what it lacks.
SUMMARY = ["task", "lora_repo_id", "calib_samples", "edit_mode", "seed", "amp_factor", "sup_factor"]
SUMMARY += ["soft_temperature", "soft_pivot_mode", "pass@1"]
ADDED = [
    "metric",
    "standard_error",
    "n",
    "difference",
    "low",
    "high",
    "p_value",
    "p_holm",
    "verdict",
    "label",
    "run",
    "notes",
]
TABLES = ["results.json", "results.jsonl", "summary.csv", "summary.tsv", "summary_table.md", "report.html", "best.json"]
MEANS = ["task", "lora_repo_id", "calib_samples", "edit_mode", "amp", "sup", "soft_temperature", "soft_pivot_mode"]
MEANS += ["metric", "n", "mean", "std", "standard_error", "run"]


def write_results(
    plan: Plan, planner: Planner, ledger: Ledger, out_dir: Path, report: str = "report.html"
) -> dict[str, Any]:
    """Write every table and the report of a finished sweep.

    Args:
        plan: what was to be run; all of it is in the ledger, well or failed.
        planner: with the adapters and tasks of the plan.
        ledger: what became of it.
        out_dir: the sweep's folder.
        report: file name of the report.

    Returns:
        {out_dir, report, lines, runs, failures, notes}: as results.json has them.
    """
    records = ledger.runs
    outcomes = analyse(plan, records)
    labels = label(plan.runs.values())
    failed = ledger.failures
    failures = [
        {"run": name, "label": labels[name], "where": run.config.where, "error": failed[name]}
        for name, run in plan.runs.items()
        if name not in outcomes
    ]
    used = [entry for entry in ledger.entries if any(run["id"] in outcomes for run in entry["runs"])]
    rows = [_row(config, plan.runs[name], labels[name], outcomes.get(name)) for config, name in plan.lines]
    remarks = notes(plan, used, len(failures))
    content = {
        "lines": rows,
        "runs": [
            {**outcome.to_dict(), "config": records[name]["config"], "metrics": records[name]["metrics"]}
            for name, outcome in outcomes.items()
        ],
        "failures": failures,
        "notes": remarks,
    }
    replace_file(out_dir / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    replace_file(out_dir / "results.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    for name, delimiter in (("summary.csv", ","), ("summary.tsv", "\t")):
        replace_file(out_dir / name, _separated(rows, delimiter))
    replace_file(out_dir / "summary_table.md", _markdown(plan, outcomes, failures, remarks))
    _note_best(plan, outcomes, out_dir)
    write_report(out_dir / report, plan, planner, outcomes, failures, remarks, out_dir)
    return {"out_dir": str(out_dir), "report": str(out_dir / report), **content}


def as_text(result: Mapping[str, Any]) -> str:
    """The results for people at a terminal."""
    width = max((len(run["label"]) for run in result["runs"]), default=3)
    lines = [f"{'run':<{width}}  score ± std. err.   difference, 95 % interval       p (Holm)  verdict"]
    for run in result["runs"]:
        line = f"{run['label']:<{width}}  {run['score']:6.2%} ± {run['standard_error']:.2%}"
        if run["comparison"] is not None:
            low, high = run["comparison"]["interval"]
            line += f"   {run['comparison']['difference']:+7.2%} ({low:+.2%} to {high:+.2%})"
        if run["p_holm"] is not None:
            line += f"   {p_text(run['p_holm']):<7}   {run['verdict']}"
        lines.append(line)
    lines += [f"failed: {run['label']} ({run['where']}): {run['error']}" for run in result["failures"]]
    return "\n".join([*lines, f"report: {result['report']}"])


def notes(plan: Plan, entries: Sequence[Mapping[str, Any]], failures: int) -> list[str]:
    """What a reader of the tables has to know."""
    variants = len(plan.of_role("variant"))
    found = []
    if failures:
        found.append(
            f"{failures} of {len(plan.runs)} runs failed, see below; the same sweep, started again, tries them again. "
            "In Holm's correction, variants without a comparison count as p = 1."
        )
    found += [
        "Every difference is to the original adapter on the same problems: 95 % interval by Newcombe's method, p by "
        "McNemar's exact test (where problems have several answers: normal interval, sign-flip test). p (Holm) is "
        f"corrected for the {variants} variants of the sweep: below 0.05, a difference is unlikely to be luck. The "
        "intervals are not corrected.",
    ]
    counts = sorted({len(controls) for controls in plan.controls_of.values()})
    if counts and counts != [0]:
        seeds = " to ".join(map(str, {counts[0]: 0, counts[-1]: 0}))
        found.append(
            f"Random controls are random_index edits, {seeds} seeds each, with the counts and factors of a variant or, "
            "where its mode lacks them, the defaults (counts: z_score, robust_z, spectral_gate, gd; factors: gd). A "
            "variant within their range has shown no more than random edits do. One above all of them need not be "
            "better: of variants that are no better than random, one in (controls + 1) is above all by luck."
        )
    engines = sorted({f"{entry['engine']}, {entry['engine_settings'].get('dtype', '')}" for entry in entries})
    found.append("Texts by " + "; ".join(engines) + ".")
    if any("float32" not in engine for engine in engines):
        found.append(
            "Greedy decoding in half precision depends a little on the batch that a text is in, so two runs of one "
            "adapter may differ in a few problems. All variants were run in batches of the same shape as far as the "
            "engine lets that be chosen."
        )
    versions = {json.dumps(entry["versions"], sort_keys=True) for entry in entries}
    if len(versions) > 1:
        found.append(f"The runs were made with {len(versions)} different sets of versions; see ledger.jsonl.")
    if len(plan.lines) > len({name for _, name in plan.lines}):
        found.append(
            "Configurations that differ only in what has no effect (a seed without a draw, hyperparameters of another "
            "mode) share one run."
        )
    return found


def _row(config: Config, run: Run, label: str, outcome: Outcome | None) -> dict[str, Any]:
    own, comparison = config.hyperparameters, None if outcome is None else outcome.comparison
    low, high = (None, None) if comparison is None else comparison.interval
    return {
        "task": config.task,
        "lora_repo_id": config.label,
        **{key: own.get(key) for key in ("calib_samples", "edit_mode")},
        "edit_mode": config.mode,
        "seed": config.seed,
        **{key: own.get(key) for key in ("amp_factor", "sup_factor", "soft_temperature", "soft_pivot_mode")},
        "pass@1": outcome and outcome.score,
        "metric": config.metric,
        "standard_error": outcome and outcome.standard_error,
        "n": outcome and len(outcome.scores),
        "difference": comparison and comparison.difference,
        "low": low,
        "high": high,
        "p_value": comparison and comparison.p_value,
        "p_holm": outcome and outcome.p_holm,
        "verdict": outcome.verdict if outcome else "failed",
        "label": label,
        "run": run.id,
        "notes": config.notes,
        "hyperparameters": own,
    }


def _separated(rows: Iterable[Mapping[str, Any]], delimiter: str) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, SUMMARY + ADDED, extrasaction="ignore", delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _markdown(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    failures: Sequence[Mapping[str, str]],
    remarks: Iterable[str],
) -> str:
    alike: dict[str, list[tuple[Config, Outcome]]] = {}
    for config, name in plan.lines:
        if name not in outcomes:
            continue
        own = {key: value for key, value in config.hyperparameters.items() if key != "seed"}
        key = repr((config.task, config.label, config.mode, sorted(own.items()), config.profile, config.evaluation))
        alike.setdefault(key, []).append((config, outcomes[name]))
    means = []
    for members in alike.values():
        config, runs = members[0][0], {outcome.run.id: outcome for _, outcome in members}
        scores = [outcome.score for outcome in runs.values()]
        name = re.sub(r", (sampling_)?seed \d+", "", members[0][1].label)
        own = config.hyperparameters
        keys = ("amp_factor", "sup_factor", "soft_temperature", "soft_pivot_mode")
        error = fmean(outcome.standard_error for outcome in runs.values())
        head = [config.task, config.label, own.get("calib_samples"), config.mode, *(own.get(key) for key in keys)]
        means.append([*head, config.metric, len(scores), fmean(scores), pstdev(scores), error, name])
    parts = ["# Means over seeds", _table(MEANS, means)]
    parts += ["# Against the original adapter", _table(HEAD, [cells(o) for o in outcomes.values()])]
    if failures:
        parts += ["# Failed", _table(FAILED, [failure_cells(failure) for failure in failures])]
    return "\n\n".join([*parts, *remarks]) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(values: Iterable[Any]) -> str:
        return "| " + " | ".join(_cell(value) for value in values) + " |"

    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _note_best(plan: Plan, outcomes: Mapping[str, Outcome], out_dir: Path) -> None:
    """kept_adapters/TASK/ADAPTER/MODE/best.json: which of the adapters that are kept did best."""
    best: dict[Path, Outcome] = {}
    for config, name in plan.lines:
        folder = out_dir / RUNS / name / ADAPTER
        if name not in outcomes or not config.keep_adapter or not folder.is_dir():
            continue
        place = (
            out_dir
            / "kept_adapters"
            / config.task
            / re.sub(r"[^\w.-]+", "_", config.label.strip("/."))[-100:]
            / config.mode
        )
        if place not in best or outcomes[name].score > best[place].score:
            best[place] = outcomes[name]
    for place, outcome in best.items():
        place.mkdir(parents=True, exist_ok=True)
        adapter = str(Path(RUNS) / outcome.run.id / ADAPTER)
        content = {"adapter": adapter, "label": outcome.label, "score": outcome.score}
        replace_file(place / "best.json", json.dumps({**content, "standard_error": outcome.standard_error}) + "\n")

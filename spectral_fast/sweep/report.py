"""The report of a sweep: one HTML file that needs no other and runs no program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from os.path import commonprefix
from pathlib import Path

from spectral_fast.atomic import replace_file
from spectral_fast.edit import EditedModule
from spectral_fast.evaluation.comparison import SIGNIFICANCE
from spectral_fast.report import spectra_picture
from spectral_fast.report.page import document, figure, table
from spectral_fast.sensitivity import RECORD, Sensitivity
from spectral_fast.sweep.analysis import Outcome
from spectral_fast.sweep.cells import FAILED, HEAD, cells, failure_cells
from spectral_fast.sweep.pictures import against_controls, against_hyperparameters
from spectral_fast.sweep.plan import Plan, Planner
from spectral_fast.sweep.tasks import read_answers
from spectral_fast.sweep.work import PROBES, RUNS

# Of one adapter: variants with spectra, and with examples of what flipped; examples per variant and direction.
SPECTRA, FLIPPED, FLIPS = 4, 20, 8
LONGEST = 4000  # characters of a text that is shown


def write_report(
    path: Path,
    plan: Plan,
    planner: Planner,
    outcomes: Mapping[str, Outcome],
    failures: Sequence[Mapping[str, str]],
    notes: Sequence[str],
    out_dir: Path,
) -> None:
    """Write the report: tables, scores against hyperparameters and random edits, spectra, and what flipped.

    Args:
        path: the file.
        plan: what was run.
        planner: with the adapters and tasks of the plan.
        outcomes: by run id, of the runs that did not fail.
        failures: the others, see `write_results`.
        notes: what a reader has to know.
        out_dir: the sweep's folder, with probes and generations.
    """
    variants = [outcome for outcome in outcomes.values() if outcome.run.role == "variant"]
    apart = sum(1 for outcome in variants if outcome.p_holm is not None and outcome.p_holm < SIGNIFICANCE)
    parts = [
        "<h1>Sweep</h1>",
        f'<p class="soft">{len(plan.lines):,} configurations, {len(outcomes):,} runs, {len(variants):,} variants, of '
        f"which {apart:,} can be told from the original adapter.</p>",
        "<h2>Results</h2>",
        table("Results", HEAD, (cells(outcome) for outcome in outcomes.values())),
        *(f"<p>{escape(note)}</p>" for note in notes),
    ]
    if failures:
        parts += ["<h2>Failed</h2>", table("Failed", FAILED, map(failure_cells, failures), numbers=False)]
    for baseline in (outcome for outcome in outcomes.values() if outcome.run.role == "baseline"):
        mine = [o for o in outcomes.values() if plan.baseline_of.get(o.run.id) == baseline.run.id and o is not baseline]
        parts += _about(baseline, mine, planner, out_dir)
    replace_file(path, document("Sweep", parts))


def _about(baseline: Outcome, others: Sequence[Outcome], planner: Planner, out_dir: Path) -> Iterator[str]:
    """All on one adapter and task."""
    config = baseline.run.config
    variants = [outcome for outcome in others if outcome.run.role == "variant"]
    controls = [outcome for outcome in others if outcome.run.role == "control"]
    yield f"<h2>{escape(config.label)} on {escape(config.task)}</h2>"
    for picture in (against_controls(variants, controls), against_hyperparameters(baseline, variants)):
        if picture is not None:
            yield figure(picture)
    best = sorted(variants, key=lambda outcome: -outcome.score)
    if len(best) > SPECTRA:
        yield f'<p class="soft">Spectra of the {SPECTRA} best of {len(best)} variants.</p>'
    for outcome in best[:SPECTRA]:
        edited = _edited(outcome, planner, out_dir)
        picture = None if edited is None else spectra_picture(edited)
        if picture is not None:
            yield figure(replace(picture, title=f"{outcome.label}: singular values before and after"))
    yield from _flips(baseline, variants, planner, out_dir)


def _edited(outcome: Outcome, planner: Planner, out_dir: Path) -> dict[str, EditedModule] | None:
    """What the variant's edit did, made again from the probe (None if someone removed it): a function of s and g."""
    run, policy = outcome.run, outcome.run.config.policy
    assert policy is not None
    assert run.probe is not None
    if not (out_dir / PROBES / run.probe / RECORD).is_file():
        return None
    measured = Sensitivity.load(out_dir / PROBES / run.probe).modules
    names = [module.name for module in planner.modules(run.config)]
    return {
        name: EditedModule(measured[name].s, measured[name].g, policy.apply(measured[name].s, measured[name].g, name))
        for name in names
    }


def _flips(baseline: Outcome, variants: Sequence[Outcome], planner: Planner, out_dir: Path) -> Iterator[str]:
    """Problems that one of the two solves more often, with both texts."""
    task = baseline.run.config.task
    original = read_answers(task, out_dir / RUNS / baseline.run.id)
    prompts = planner.task(baseline.run.config).prompts
    start = commonprefix(list(prompts)) if len(prompts) > 1 else ""  # noqa: RUF071, of texts, not paths
    shared = len(start.rpartition("\n\n")[0])  # the worked examples
    questions = {name: prompt[shared:].lstrip() for name, prompt in zip(original, prompts, strict=True)}
    yield f"<h2>What flipped: {escape(baseline.run.config.label)}</h2>"
    if len(variants) > FLIPPED:
        variants = sorted(variants, key=lambda outcome: -abs(outcome.score - baseline.score))[:FLIPPED]
        yield f'<p class="soft">The {FLIPPED} variants that differ most from the original.</p>'
    for outcome in variants:
        answers = read_answers(task, out_dir / RUNS / outcome.run.id)
        gained = [name for name, answer in answers.items() if answer["score"] > original[name]["score"]]
        lost = [name for name, answer in answers.items() if answer["score"] < original[name]["score"]]
        parts = []
        for words, names in (("only after the edit", gained), ("only before it", lost)):
            shown = names[:FLIPS]
            more = f", {len(shown)} of them shown" if len(shown) < len(names) else ""
            if names:
                parts.append(f"<p>Right {words}: {len(names)}{more}.</p>")
            for name in shown:
                columns = [
                    ("problem", questions[name]),
                    ("before", original[name]["text"]),
                    ("after", answers[name]["text"]),
                ]
                texts = "".join(f"<dt>{word}</dt><dd><pre>{_shown(text)}</pre></dd>" for word, text in columns)
                parts.append(f'<dl class="flip" data-problem="{escape(name)}">{texts}</dl>')
        inside = "".join(parts) or "<p>No problem.</p>"
        summary = f"{escape(outcome.label)}: {len(gained)} gained, {len(lost)} lost"
        yield f"<details><summary>{summary}</summary>{inside}</details>"


def _shown(text: str) -> str:
    """A text, escaped; the end of a long one, where the question of a prompt and the answer of a text stand."""
    return escape(text if len(text) <= LONGEST else f"[…] {text[-LONGEST:]}")

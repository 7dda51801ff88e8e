"""A gated training beside one without a gate: losses, time, what was accepted, and whether less did as well."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from spectral_fast.atomic import replace_file
from spectral_fast.report.drawing import CORE, INK, NOISE, OTHER, STYLE, WIDTH, Floats, Picture
from spectral_fast.training.folder import GATE_METRICS, LOG_HISTORY

SAME_LOSS, FEWER = 0.005, 0.30  # what counts as success: the loss within 0.5 %, and 30 % rejected
WINDOW = 50  # micro-batches of a moving average
STATE = "trainer_state.json"


@dataclass(frozen=True)
class TrainingRecord:
    """What a training has left in its folder.

    Attributes:
        path: the folder.
        entries: of the trainer's log, in their order.
        gate: gate_metrics.json; None without a gate.
    """

    path: Path
    entries: list[dict[str, Any]]
    gate: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> TrainingRecord:
        """From the folder of `train`, or of any trainer of transformers that has saved a checkpoint.

        Raises:
            FileNotFoundError: it has neither log_history.json nor a trainer_state.json.
            ValueError: a file is broken, or nothing was logged.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"a training leaves a folder; there is none at {path}")
        numbered = [(int(m[1]), x) for x in path.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", x.name))]
        states = [folder / STATE for _, folder in sorted(numbered, reverse=True)]
        file = next((x for x in (path / LOG_HISTORY, path / STATE, *states) if x.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} has no {LOG_HISTORY}, nor a checkpoint with a {STATE}")
        content = _json(file)
        entries = content.get("log_history") if isinstance(content, dict) else content
        whole = isinstance(entries, list) and all(isinstance(entry, dict) and "step" in entry for entry in entries)
        if entries is None or not whole or not any("loss" in entry for entry in entries):
            raise ValueError(f"{file} holds no training loss: train longer than logging_steps")
        metrics = path / GATE_METRICS
        gate = _json(metrics) if metrics.is_file() else None
        wanted = ("acceptance_rate", "accept_history")
        if gate is not None and not (isinstance(gate, dict) and all(name in gate for name in wanted)):
            raise ValueError(f"{metrics} must have {' and '.join(wanted)}, as a gated training leaves them")
        return cls(path, entries, gate)

    def curve(self, key: str) -> tuple[Floats, Floats]:
        """Steps and values of the log's entries with this key; steps count rejected ones, too."""
        found = [(entry["step"], entry[key]) for entry in self.entries if entry.get(key) is not None]
        steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
        return steps, values

    def last(self, key: str) -> float | None:
        """The last value that was logged under this key."""
        values = self.curve(key)[1]
        return float(values[-1]) if len(values) else None

    def optimizer_steps(self, steps: Floats) -> Floats:
        """How many steps of the optimizer there were at these steps of the log."""
        at, made = self.curve("gate/optimizer_steps")
        return np.interp(steps, [0, *at], [0, *made]) if len(at) else steps

    def facts(self) -> dict[str, Any]:
        """Losses, counts and seconds; None for what was not logged."""
        steps = max(entry["step"] for entry in self.entries)
        gate = self.gate or {"acceptance_rate": 1.0}
        return {
            "final_loss": self.last("loss"),
            "eval_loss": self.last("eval_loss"),
            "steps": steps,
            "optimizer_steps": gate.get("optimizer_steps", steps),
            "acceptance_rate": gate["acceptance_rate"],
            "avg_novelty": gate.get("avg_novelty"),
            "seconds": self.last("train_runtime"),
        }


def analyze(baseline: Path | str, slora: Path | str, output: Path | str, *, overwrite: bool = False) -> dict[str, Any]:
    """Compare a gated training with one without a gate, and write a report in Markdown with two pictures beside it.

    It succeeded if the final losses differ by less than 0.5 % and at least 30 % of the micro-batches were rejected.
    Losses are those on held-out data where both trainings have measured them, else the last ones of the training.

    Args:
        baseline: folder of the training without a gate.
        slora: folder of the gated one.
        output: the report; its pictures are STEM-loss.png and STEM-gate.png in the same folder, which is made.
        overwrite: replace a report that is there.

    Returns:
        {baseline, slora: facts of each; compared: which loss; difference: relative; rejected: share; success, verdict,
        output, pictures}.

    Raises:
        FileExistsError: there is such a report already.
        FileNotFoundError, ValueError: as `TrainingRecord.read`; or the second folder is of no gated training, or the
            first is of one.
    """
    baseline, slora, output = Path(baseline), Path(slora), Path(output)
    if output.is_dir():
        raise FileExistsError(f"{output} is a folder; name a file for the report")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already: --overwrite it, or choose another output")
    plain, gated = TrainingRecord.read(baseline), TrainingRecord.read(slora)
    if gated.gate is None:
        raise ValueError(f"{slora} is of no gated training: it has no {GATE_METRICS}")
    if plain.gate is not None:
        raise ValueError(f"{baseline} is of a gated training: it has {GATE_METRICS}; the baseline has no gate")
    result: dict[str, Any] = {"baseline": plain.facts(), "slora": gated.facts()}
    both = all(result[name]["eval_loss"] is not None for name in ("baseline", "slora"))
    key = "eval_loss" if both else "final_loss"
    before, after = result["baseline"][key], result["slora"][key]
    result["compared"] = key
    result["difference"] = after / before - 1 if before else math.nan
    result["rejected"] = 1 - result["slora"]["acceptance_rate"]
    result["success"] = abs(result["difference"]) < SAME_LOSS and result["rejected"] >= FEWER
    result["verdict"] = _verdict(result)
    with style.context(["default", STYLE]):
        pictures = [_losses(plain, gated), _decisions(gated)]
    output.parent.mkdir(parents=True, exist_ok=True)
    files = [output.with_name(f"{output.stem}-{picture.name}.png") for picture in pictures]
    for file, picture in zip(files, pictures, strict=True):
        file.write_bytes(picture.png)
    replace_file(output, _page(plain, gated, result, list(zip(files, pictures, strict=True))))
    return {**result, "output": str(output), "pictures": [str(file) for file in files]}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error


def _verdict(result: dict[str, Any]) -> str:
    what = "loss on held-out data" if result["compared"] == "eval_loss" else "last training loss"
    told = (
        f"{what} {result['difference']:+.2%} against the baseline, {result['rejected']:.1%} of micro-batches rejected"
    )
    return f"{'success' if result['success'] else 'no success'}: {told}"


def _page(
    plain: TrainingRecord, gated: TrainingRecord, result: dict[str, Any], pictures: Sequence[tuple[Path, Picture]]
) -> str:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = (
        ("last training loss", "final_loss", ".4f"),
        ("loss on held-out data", "eval_loss", ".4f"),
        ("steps, the rejected ones too", "steps", "d"),
        ("steps of the optimizer", "optimizer_steps", "d"),
        ("micro-batches accepted", "acceptance_rate", ".1%"),
        ("novelty, mean", "avg_novelty", ".3f"),
        ("seconds, since a resumption if there was one", "seconds", ".0f"),
    )
    lines = [
        "# Gated training beside training on all",
        "",
        f"Baseline: `{plain.path}`; gated: `{gated.path}`.",
        "",
        f"**{result['verdict'][0].upper()}{result['verdict'][1:]}.**",
        "",
        "| | baseline | gated |",
        "|---|---|---|",
        *(
            f"| {name} | {shown(result['baseline'][key], form)} | {shown(result['slora'][key], form)} |"
            for name, key, form in rows
        ),
        "",
        f"Success is a loss within {SAME_LOSS:.1%} of the baseline's and at least {FEWER:.0%} rejected. It does not "
        "say that the gate chose well: skipping as many at random may do as well. To know, train once more with "
        "`slora_gate: random`, `slora_burn_in: 0` and "
        f"`slora_target_novelty: {result['slora']['acceptance_rate']:.3f}`.",
        "",
    ]
    for file, picture in pictures:
        lines += [f"## {picture.title}", "", f"![{picture.title}]({file.name})", "", picture.caption, ""]
    return "\n".join(lines)


def _losses(plain: TrainingRecord, gated: TrainingRecord) -> Picture:
    figure = Figure(figsize=(WIDTH, 3.6))
    panels = figure.subplots(1, 2, sharey=True)
    for record, colour, name in ((plain, OTHER, "baseline"), (gated, CORE, "gated")):
        for key, line, label in (("loss", "-", "training"), ("eval_loss", "o--", "held-out")):
            steps, values = record.curve(key)
            if len(steps):
                how = {"color": colour, "lw": 1.0, "ms": 3, "label": f"{name}, {label}"}
                panels[0].plot(steps, values, line, **how)
                panels[1].plot(record.optimizer_steps(steps), values, line, **how)
    panels[0].set_xlabel("steps, the rejected ones too")
    panels[1].set_xlabel("steps of the optimizer")
    panels[0].set_ylabel("loss")
    panels[1].legend()
    caption = "Left: at as much data seen. Right: at as many steps of the optimizer."
    return Picture.of(figure, "loss", "Losses", caption)


def _decisions(gated: TrainingRecord) -> Picture:
    assert gated.gate is not None
    figure = Figure(figsize=(WIDTH, 2.8))
    panel = figure.subplots()
    novelties = gated.gate.get("novelty_history") or []
    if novelties:
        panel.plot(range(1, len(novelties) + 1), novelties, ".", color=OTHER, ms=3, label="novelty")
        panel.plot(*_moving(novelties), color=INK, lw=1.0, label="novelty, moving average")
    steps, thresholds = gated.curve("gate/current_novelty_threshold")
    if len(steps):
        at = gated.curve("gate/total_steps")[1]  # logged together
        panel.plot(at, thresholds, color=NOISE, lw=1.0, label="threshold")
    panel.plot(*_moving(gated.gate["accept_history"]), color=CORE, lw=1.0, label="accepted, moving average")
    panel.set_ylim(-0.03, 1.03)
    panel.set_xlabel("micro-batches")
    panel.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    caption = f"Moving averages are over the last {WINDOW} micro-batches."
    return Picture.of(figure, "gate", "Decisions of the gate", caption)


def _moving(values: Sequence[float]) -> tuple[Floats, Floats]:
    """Micro-batches from 1 on, and means over the last `WINDOW` of them."""
    sums = np.concatenate([[0.0], np.cumsum(np.array(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - WINDOW, 0)
    return ends.astype(np.float64), (sums[ends] - sums[starts]) / (ends - starts)

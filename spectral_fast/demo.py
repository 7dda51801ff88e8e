"""The main job on the embedded model: probe, edit, matched controls, evaluation of all, a table and a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.atomic import check_out_dir, replace_directory
from spectral_fast.calibration.options import CalibrationOptions, ModelOptions
from spectral_fast.calibration.probe import probe
from spectral_fast.edit import edit_adapter
from spectral_fast.evaluation.adapters import evaluate_adapters
from spectral_fast.evaluation.comparison import compare
from spectral_fast.evaluation.engines import EngineOptions
from spectral_fast.evaluation.evaluate import read_correct
from spectral_fast.evaluation.profiles import EvaluationOptions
from spectral_fast.policies import AbsSelect, hard_choice, matched_control
from spectral_fast.progress import Counter
from spectral_fast.sensitivity import RECORD
from spectral_fast.statistics import Stability

REPORT, PROBED = "report.html", "probed"
CONTROL_SEEDS = (1, 2)


def run_demo(
    out_dir: Path | str,
    *,
    overwrite: bool = False,
    max_samples: int = -1,
    bar: Callable[[str], Callable[..., Any]] = lambda _: iter,
    counter: Counter = lambda *_: nullcontext(),
) -> dict[str, Any]:
    """Run the main job in `out_dir`: probed/, edited/, control_1/ …, evaluation/, pictures/ and report.html.

    Args:
        out_dir: folder for everything; report.html comes last.
        overwrite: replace what an earlier demo left there.
        max_samples: held-out problems to solve; -1 for all 512.
        bar: description -> wrapper of a list that shows progress.
        counter: progress of the evaluations.

    Returns:
        {"report", "seconds", "rows"}: one row per adapter with accuracy, standard error and, against the original,
        difference, 95 % interval and p-value.
    """
    from spectral_fast.report import EvaluationRow, write_report

    began, out_dir = time.perf_counter(), Path(out_dir)
    check_out_dir(out_dir, overwrite=overwrite, marker=PROBED)  # the first that a demo leaves
    base_model = str(embedded.base_model_dir())
    adapter = Adapter.open(embedded.adapter_dir())
    modules = adapter.select()
    data = CalibrationOptions(calib_data=str(embedded.calibration_file()))
    sensitivity = probe(adapter, modules, base_model, data, progress=bar("calibrate"))
    policy = AbsSelect()
    with replace_directory(out_dir / PROBED, overwrite=overwrite, marker=RECORD) as folder:
        sensitivity.save(folder)
    edited = edit_adapter(
        adapter, policy, out_dir / "edited", modules=modules, sensitivity=sensitivity, overwrite=overwrite
    )
    folders = {"original": adapter.path, "edited": out_dir / "edited"}
    for seed in CONTROL_SEEDS:
        folder = out_dir / f"control_{seed}"
        edit_adapter(adapter, matched_control(policy, seed), folder, modules=modules, overwrite=overwrite)
        folders[f"random control {seed}"] = folder
    results = evaluate_adapters(
        base_model,
        {name.replace(" ", "_"): folder for name, folder in folders.items()},
        out_dir / "evaluation",
        ModelOptions(),
        EvaluationOptions(eval_data=str(embedded.heldout_file()), fewshot=0, max_samples=max_samples, max_tokens=128),
        EngineOptions(engine="transformers", batch_size=64),
        progress=counter,
    )
    correct = [read_correct(result["predictions_path"]) for result in results.values()]
    comparisons = [None, *(compare(correct[0], other) for other in correct[1:])]
    rows = [
        EvaluationRow(name, result["acc"], result["standard_error"])
        if against is None
        else EvaluationRow(
            name, result["acc"], result["standard_error"], against.difference, against.interval, against.p_value
        )
        for name, result, against in zip(folders, results.values(), comparisons, strict=True)
    ]
    facts = {
        "mode": policy.mode,
        "calibration samples": sensitivity.record["samples_used"],
        "labelled tokens": sensitivity.record["labels"],
        "evaluated on": f"{results['original']['total']} held-out problems, greedy decoding",
        "seconds": round(time.perf_counter() - began),
    }
    stability = None if sensitivity.samples is None else Stability.of(sensitivity.samples, hard_choice(policy))
    title = "The embedded adapter, edited"
    pictures = write_report(out_dir / REPORT, title, edited, evaluation=rows, facts=facts, stability=stability)
    (out_dir / "pictures").mkdir(exist_ok=True)
    for picture in pictures:
        (out_dir / "pictures" / f"{picture.name}.png").write_bytes(picture.png)
    return {
        "report": str(out_dir / REPORT),
        "seconds": round(time.perf_counter() - began, 1),
        "problems": results["original"]["total"],
        "rows": [vars(row) for row in rows],
    }


def as_text(result: dict[str, Any]) -> str:
    """The table of a demo's result, for people."""
    lines = [f"{'adapter':<18}{'accuracy':>9}{'std. err.':>11}{'difference':>12}  95 % interval     p-value"]
    for row in result["rows"]:
        line = f"{row['adapter']:<18}{row['accuracy']:>9.1%}{row['standard_error']:>11.1%}"
        if row["difference"] is not None:
            low, high = row["interval"]
            line += f"{row['difference']:>+12.1%}  {low:+.1%} to {high:+.1%}   {row['p_value']:.3f}"
        lines.append(line)
    lines.append(f"{result['problems']} held-out problems; differences are paired, p-values exact (McNemar)")
    lines.append(f"report with pictures: {result['report']} ({result['seconds']:.0f} s in all)")
    return "\n".join(lines)

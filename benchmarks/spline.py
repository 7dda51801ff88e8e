"""LS-LoRA against LoRA at equal settings: ``python -m benchmarks.spline``, or ``make spline``.

Adapters of the embedded model are trained by `spectral_fast.training` on two-step problems, for each seed once per arm,
with the same problems in the same order, the same rank, scaling and learning rate; then each answers the embedded
held-out problems, whose loss is taken, too. Arms are compared with LoRA problem by problem and seed by seed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.adaptive import BATCH, STEPS, columns, shares, train_and_answer
from benchmarks.experiment import SEEDS, Answers, interval, parser_of, write_table
from benchmarks.timing import ROOT
from spectral_fast import embedded
from spectral_fast.calibration.data import encode_question_answer
from spectral_fast.calibration.model import ModelOptions, load_model, load_tokenizer
from spectral_fast.report.splines import save_spline_picture
from spectral_fast.splines import Spline, read_splines

RESULTS = ROOT / "benchmarks" / "results" / "spline-lora.csv"
PICTURE = ROOT / "docs" / "pictures" / "splines.png"
LORA, RANK = "lora", 8
SETTINGS = {
    "lora_r": RANK,
    "lora_alpha": 2 * RANK,
    "val_dataset_path": str(embedded.heldout_file()),
}
ARMS: Mapping[str, Mapping[str, Any]] = {
    LORA: {},
    "piecewise": {"use_spline": True},
    "no_clamp": {"use_spline": True, "clamp": False},
    "soft": {"use_spline": True, "interpolation_method": "soft"},
}
MEASURED = ("train_loss", "eval_loss")
OF_SPLINES = ("deviation", "slope_variance", "input_scale", "output_scale")
SEEN = 16  # held-out problems on which the outputs of LoRA are looked at
SHARE = 0.999


@dataclass(frozen=True)
class Run:
    """One adapter: losses, which problems it solves, and what its splines are (nothing for LoRA)."""

    arm: str
    seed: int
    parameters: int
    losses: Mapping[str, float]
    correct: Answers
    facts: Mapping[str, float]
    splines: Mapping[str, Spline]


def run(arm: str, seed: int, folder: Path, steps: int, problems: int) -> Run:
    """Train and evaluate one adapter."""
    held_out = {} if problems < 0 else {"val_samples": problems}
    trained, correct = train_and_answer({**SETTINGS, **held_out, **ARMS[arm]}, seed, folder, steps, problems)
    facts, splines = {}, {}
    if arm != LORA:
        splines = read_splines(trained["final_checkpoint"])
        facts = {name: trained["splines"][name] for name in OF_SPLINES}
        facts["reach"] = reach(Path(trained["final_checkpoint"]))
    losses = {name: trained[name] for name in MEASURED}
    return Run(arm, seed, trained["trainable_parameters"], losses, correct, facts, splines)


def reach(adapter: Path) -> float:
    """Below which 99.9 % of the outputs of LoRA are in absolute value, over all layers: what the splines are given."""
    from peft import PeftModel

    import spectral_fast.lslora

    base, how = str(embedded.base_model_dir()), ModelOptions()
    tokenizer = load_tokenizer(base, how)
    model = PeftModel.from_pretrained(load_model(base, how), str(adapter)).eval()
    seen: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, spectral_fast.lslora.SplineLayer):
            layer.lora_B["default"].register_forward_hook(lambda *call: seen.append(call[2].abs().flatten()))
    lines = embedded.heldout_file().read_text(encoding="utf-8").splitlines()[:SEEN]
    with torch.inference_mode():
        for row in map(json.loads, lines):
            model(input_ids=torch.tensor([encode_question_answer(tokenizer, row["question"], row["answer"]).ids]))
    z = torch.cat(seen)
    return float(z.kthvalue(math.ceil(SHARE * len(z))).values)


def table(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A row per run, and one per arm, in which a problem counts with the share of the seeds that solve it."""
    baselines = {run.seed: run for run in runs if run.arm == LORA}
    for run in runs:
        yield _row(run.arm, str(run.seed), [run], baselines)
    for arm in ARMS:
        yield _row(arm, "all", [run for run in runs if run.arm == arm], baselines)


def _row(arm: str, seed: str, runs: Sequence[Run], baselines: Mapping[int, Run]) -> dict[str, Any]:
    from spectral_fast.evaluation.comparison import compare

    answers = ([baselines[run.seed].correct for run in runs], [run.correct for run in runs])
    single = len(runs) == 1
    compared = compare(*(found[0] if single else shares(found) for found in answers))
    row: dict[str, Any] = {"arm": arm, "seed": seed, "parameters": runs[0].parameters}
    row |= {name: f"{fmean(run.losses[name] for run in runs):.4f}" for name in MEASURED}
    row |= columns(compared, LORA)
    accuracy = [fmean(run.correct.values()) - fmean(baselines[run.seed].correct.values()) for run in runs]
    loss = [run.losses["eval_loss"] - baselines[run.seed].losses["eval_loss"] for run in runs]
    for name, differences in (("accuracy", accuracy), ("eval_loss", loss)):
        low, high = ("" if math.isnan(end) else f"{end:+.4f}" for end in interval(differences))
        row |= {f"{name}_seeds": f"{fmean(differences):+.4f}", f"{name}_low": low, f"{name}_high": high}
    return row | {name: f"{fmean(run.facts[name] for run in runs):.4f}" if runs[0].facts else "" for name in FACTS}


FACTS = (*OF_SPLINES, "reach")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, compare; print the table, write it and the picture of the splines of the first seed."""
    parser = parser_of("benchmarks.spline", __doc__, RESULTS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of batches of {BATCH} (default: {STEPS})")
    parser.add_argument("--problems", type=int, default=-1, help="held-out problems (default: all 512)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG to write (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = []
    for seed in range(args.seeds):
        for arm in ARMS:
            with TemporaryDirectory() as folder:
                runs.append(run(arm, seed, Path(folder), args.steps, args.problems))
            found = f"{fmean(runs[-1].correct.values()):.4f}, {runs[-1].losses} {runs[-1].facts}"
            print(f"{arm}, seed {seed}: {found}", file=sys.stderr, flush=True)
    save_spline_picture(args.picture, next(run.splines for run in runs if run.arm == "piecewise"))
    write_table(table(runs), {"steps": args.steps, "batch": BATCH}, args.out, "benchmarks.spline", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())

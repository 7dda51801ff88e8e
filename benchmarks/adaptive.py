"""Adaptive ranks against one rank, at as many parameters: ``python -m benchmarks.adaptive``, or ``make adaptive``.

LoRA adapters of the embedded model are trained by `spectral_fast.training` on two-step problems, for each seed once per
arm, with the same problems in the same order, the same learning rate and the same scaling alpha / r = 2; then each
answers the embedded held-out problems. Arms are compared problem by problem with the uniform rank.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.machine import commit, hardware
from benchmarks.timing import ROOT
from spectral_fast import ModelOptions, embedded
from spectral_fast.embedded.problems import stream
from spectral_fast.evaluation.adapters import evaluate_adapters
from spectral_fast.evaluation.comparison import Comparison, compare
from spectral_fast.evaluation.engines import EngineOptions
from spectral_fast.evaluation.evaluate import read_correct
from spectral_fast.evaluation.profiles import EvaluationOptions
from spectral_fast.training import load, train

RESULTS = ROOT / "benchmarks" / "results" / "adaptive-ranks.csv"
UNIFORM, RANK = "uniform", 8
ADAPTIVE = {"adaptive_ranks": True, "budget_uniform_rank": RANK}
ARMS: Mapping[str, Mapping[str, Any]] = {
    UNIFORM: {"lora_r": RANK, "lora_alpha": 2 * RANK},
    "paper": {**ADAPTIVE, "rank_preset": "paper"},
    "source": {**ADAPTIVE, "rank_preset": "source"},
    "paper_all": {**ADAPTIVE, "rank_preset": "paper", "top_n_percentile": 1.0},  # no layer is left out
}
BATCH, STEPS, SEEDS = 8, 120, 3
TRAINING = (
    f"--num_train_epochs 1 --per_device_train_batch_size {BATCH} --learning_rate 5e-3 --warmup_steps 10 "
    "--train_sampling_strategy group_by_length --no_gradient_checkpointing --save_strategy no --logging_steps 50"
)

Answers = dict[Any, bool]


@dataclass(frozen=True)
class Run:
    """One adapter: how it was trained, and which problems it solves."""

    arm: str
    seed: int
    parameters: int
    ranks: list[int]
    train_loss: float
    correct: Answers


def run(arm: str, seed: int, folder: Path, steps: int, problems: int) -> Run:
    """Train and evaluate one adapter."""
    trained, correct = train_and_answer(ARMS[arm], seed, folder, steps, problems)
    return Run(
        arm=arm,
        seed=seed,
        parameters=trained["trainable_parameters"],
        ranks=sorted(trained["rank_pattern"].values()),
        train_loss=trained["train_loss"],
        correct=correct,
    )


def train_and_answer(
    arm: Mapping[str, Any], seed: int, folder: Path, steps: int, problems: int
) -> tuple[dict[str, Any], Answers]:
    """What `train` gives for the flags of an arm, and the answers of its adapter, which stays in the folder."""
    rows = islice(stream(2, seed=1000 + seed, held_out=False), steps * BATCH)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = str(embedded.base_model_dir())
    flags = {
        "model_name_or_path": base,
        "train_dataset_path": str(data),
        "cache_dir": str(folder / "cache"),
        "lora_dropout": 0.0,
        **arm,
    }
    trained = train(load(None, flags, [*TRAINING.split(), "--seed", str(seed), "--output_dir", str(folder / "run")]))
    [result] = evaluate_adapters(
        base,
        {None: Path(trained["final_checkpoint"])},
        folder,
        ModelOptions(),
        EvaluationOptions(eval_data=str(embedded.heldout_file()), max_samples=problems, fewshot=0, max_tokens=110),
        EngineOptions(engine="transformers"),
    ).values()
    return trained, read_correct(result["predictions_path"])


def table(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A row per run, and one per arm, in which a problem counts with the share of the seeds that solve it."""
    baselines = {run.seed: run for run in runs if run.arm == UNIFORM}
    for run in runs:
        compared = compare(baselines[run.seed].correct, run.correct)
        yield {"arm": run.arm, "seed": run.seed, **_facts([run], baselines), **columns(compared)}
    for arm in ARMS:
        mine = [run for run in runs if run.arm == arm]
        compared = compare(shares([run.correct for run in baselines.values()]), shares([run.correct for run in mine]))
        yield {"arm": arm, "seed": "all", **_facts(mine, baselines), **columns(compared)}


def _facts(runs: Sequence[Run], baselines: Mapping[int, Run]) -> dict[str, Any]:
    first = runs[0]
    return {
        "parameters": first.parameters,
        "of_uniform": f"{first.parameters / baselines[first.seed].parameters:.4f}",
        "layers": len(first.ranks) if first.arm != UNIFORM else "all",
        "ranks": "-".join(map(str, sorted({first.ranks[0], first.ranks[-1]}))),
        "train_loss": f"{fmean(run.train_loss for run in runs):.4f}",
    }


def columns(found: Comparison, baseline: str = UNIFORM) -> dict[str, Any]:
    """A comparison with the baseline as cells of a table."""
    low, high = found.interval
    return {
        "accuracy": f"{found.edited:.4f}",
        "difference": f"{found.difference:+.4f}",
        "low": f"{low:+.4f}",
        "high": f"{high:+.4f}",
        f"only_{baseline}": found.only_baseline,
        "only_this": found.only_edited,
        "p_value": f"{found.p_value:.2g}",
        "test": found.test,
        "problems": found.n,
    }


def shares(answers: Sequence[Answers]) -> dict[Any, float]:
    """Problem -> share of the seeds that solve it."""
    return {key: fmean(correct[key] for correct in answers) for key in answers[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, compare; print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of batches of {BATCH} (default: {STEPS})")
    parser.add_argument("--problems", type=int, default=-1, help="held-out problems (default: all 512)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV to write (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = []
    for seed in range(args.seeds):
        for arm in ARMS:
            with TemporaryDirectory() as folder:
                runs.append(run(arm, seed, Path(folder), args.steps, args.problems))
            print(f"{arm}, seed {seed}: {fmean(runs[-1].correct.values()):.4f}", file=sys.stderr, flush=True)
    words = ["python -m benchmarks.adaptive", *(argv if argv is not None else sys.argv[1:])]
    made = {"steps": args.steps, "batch": BATCH, "commit": commit(), "command": " ".join(words), **hardware()}
    rows = [{**row, **made} for row in table(runs)]
    for row in rows:
        print("  ".join(f"{row[name]!s:>9}" for name in list(row)[:14]))
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

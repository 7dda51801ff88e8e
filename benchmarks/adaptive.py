"""Adaptive ranks against one rank, at as many parameters: ``python -m benchmarks.adaptive``, or ``make adaptive``.

LoRA adapters of the embedded model are trained by `spectral_fast.training` on two-step problems, for each seed once per
arm, with the same problems in the same order, the same learning rate and the same scaling alpha / r = 2; then each
answers the embedded held-out problems. Arms are compared problem by problem with the uniform rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.experiment import SEEDS, Answers, answer, parser_of, train_on_problems, write_table
from benchmarks.timing import ROOT
from spectral_fast.evaluation.comparison import Comparison, compare

RESULTS = ROOT / "benchmarks" / "results" / "adaptive-ranks.csv"
UNIFORM, RANK = "uniform", 8
ADAPTIVE = {"adaptive_ranks": True, "budget_uniform_rank": RANK}
ARMS: Mapping[str, Mapping[str, Any]] = {
    UNIFORM: {"lora_r": RANK, "lora_alpha": 2 * RANK},
    "paper": {**ADAPTIVE, "rank_preset": "paper"},
    "source": {**ADAPTIVE, "rank_preset": "source"},
    "paper_all": {**ADAPTIVE, "rank_preset": "paper", "top_n_percentile": 1.0},  # no layer is left out
}
BATCH, STEPS = 8, 120
TRAINING = (
    f"--num_train_epochs 1 --per_device_train_batch_size {BATCH} --learning_rate 5e-3 --warmup_steps 10 "
    "--train_sampling_strategy group_by_length --no_gradient_checkpointing --save_strategy no --logging_steps 50"
)


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
    trained = train_on_problems(arm, TRAINING.split(), seed, steps * BATCH, folder)
    return trained, answer(trained["final_checkpoint"], folder, problems)


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
    parser = parser_of("benchmarks.adaptive", __doc__, RESULTS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of batches of {BATCH} (default: {STEPS})")
    parser.add_argument("--problems", type=int, default=-1, help="held-out problems (default: all 512)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = []
    for seed in range(args.seeds):
        for arm in ARMS:
            with TemporaryDirectory() as folder:
                runs.append(run(arm, seed, Path(folder), args.steps, args.problems))
            print(f"{arm}, seed {seed}: {fmean(runs[-1].correct.values()):.4f}", file=sys.stderr, flush=True)
    write_table(table(runs), {"steps": args.steps, "batch": BATCH}, args.out, "benchmarks.adaptive", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())

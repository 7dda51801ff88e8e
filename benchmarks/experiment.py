"""What the experiments on the embedded model share: training on problems, answers, intervals over seeds, tables."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from benchmarks.machine import command, commit, hardware
from spectral_fast import ModelOptions, embedded
from spectral_fast.embedded.problems import stream
from spectral_fast.evaluation.adapters import evaluate_adapters
from spectral_fast.evaluation.engines import EngineOptions
from spectral_fast.evaluation.evaluate import read_correct
from spectral_fast.evaluation.profiles import EvaluationOptions
from spectral_fast.training import load, train

SEEDS = 3
Answers = dict[Any, bool]  # held-out problem -> solved


def train_on_problems(
    flags: Mapping[str, Any], words: Sequence[str], seed: int, problems: int, folder: Path
) -> dict[str, Any]:
    """What `train` gives for an adapter of the embedded model, after so many two-step problems of a seed.

    Args:
        flags: settings of the project's own.
        words: flags of TRL's trainer.
        seed: of the problems and of the training.
        problems: how many.
        folder: where data, cache and `run` go.
    """
    rows = islice(stream(2, seed=1000 + seed, held_out=False), problems)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = {
        "model_name_or_path": str(embedded.base_model_dir()),
        "train_dataset_path": str(data),
        "cache_dir": str(folder / "cache"),
        "lora_dropout": 0.0,
    }
    return train(load(None, {**own, **flags}, [*words, "--seed", str(seed), "--output_dir", str(folder / "run")]))


def answer(adapter: str, folder: Path, problems: int) -> Answers:
    """Which of the first held-out problems (-1: of all) an adapter solves."""
    [result] = evaluate_adapters(
        str(embedded.base_model_dir()),
        {None: Path(adapter)},
        folder,
        ModelOptions(),
        EvaluationOptions(eval_data=str(embedded.heldout_file()), max_samples=problems, fewshot=0, max_tokens=110),
        EngineOptions(engine="transformers"),
    ).values()
    return read_correct(result["predictions_path"])


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % for the mean of differences, one per seed, by Student's t; NaN for a single one."""
    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    half = float(t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return fmean(differences) - half, fmean(differences) + half


def parser_of(module: str, about: str, results: Path) -> argparse.ArgumentParser:
    """A parser with --out, described by the first line of the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results, help="CSV to write (default: %(default)s)")
    return parser


def write_table(
    rows: Iterable[Mapping[str, Any]], made: Mapping[str, Any], out: Path, module: str, argv: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Print the rows; write them with what they were made with, commit, command and machine.

    Args:
        rows: of one set of columns.
        made: columns that are the same in all, not printed.
        out: the CSV.
        module: whose command it is.
        argv: its words; None for the process's own.
    """
    same = {**made, "commit": commit(), "command": command(module, argv), **hardware()}
    written = [{**row, **same} for row in rows]
    for row in written:
        print("  ".join(f"{row[name]!s:>10}" for name in row if name not in same))
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(written[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(written)
    return written

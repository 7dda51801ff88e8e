"""`prune-finetune`: a LoRA trained, pruned, and trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command
from spectral_fast.options import add_flags, take


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    from spectral_fast.study.options import PruneFinetuneOptions

    parser = add_command(
        commands,
        "prune-finetune",
        _run,
        "train a LoRA, prune it, train on",
        "Train a LoRA on a classifier, prune its channels, train on, and append the accuracies to results.csv.",
        examples=[
            "spectral-fast prune-finetune --model distilbert-base-uncased --dataset glue/sst2 --method channel_energy"
        ],
    )
    parser.add_argument("--model", default="distilbert-base-uncased", help="(default: distilbert-base-uncased)")
    parser.add_argument(
        "--dataset",
        default="glue/sst2",
        help="glue/sst2, a folder with train.jsonl and validation.jsonl (or .parquet), or one such file, of which a "
        "fifth is for evaluation (default: glue/sst2)",
    )
    out = "folder of results.csv, which grows, and run_args.json (default: lora_runs)"
    parser.add_argument("--out_dir", type=Path, default=Path("lora_runs"), help=out)
    add_flags(parser, PruneFinetuneOptions)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.study.options import PruneFinetuneOptions
    from spectral_fast.study.prune_finetune import as_text, run_prune_finetune

    result = run_prune_finetune(args.model, args.dataset, take(PruneFinetuneOptions, vars(args)), args.out_dir)
    return result, as_text(result)

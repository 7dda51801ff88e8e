"""`prune-finetune`: a LoRA trained, pruned, and trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command
from spectral_fast.options import add_flags
from spectral_fast.study.options import PruneFinetuneOptions
from spectral_fast.usage import take

_WRITES = {
    "results.csv": "grows by a row per run: model, dataset, method, keep_ratio, lora_r, effective_r, seed, "
    "train_samples, eval_samples, warmup_epochs, post_epochs, acc_before, acc_after, delta_acc (accuracies, 0 to 1), "
    "warm_time_sec, post_time_sec, target_modules, lora_trainable_params, lora_total_params",
    "run_args.json": "the settings of the last run",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "prune-finetune",
        _run,
        "train a LoRA, prune it, train on",
        "Trains a LoRA on a text classifier, prunes its channels, trains on, and appends the accuracies before and "
        "after to a table, so that methods can be compared over several calls. Costs the training: with the defaults"
        " 200 rows for two epochs.",
        examples=[
            "spectral-fast prune-finetune --model distilbert-base-uncased --dataset glue/sst2 --method channel_energy",
            "spectral-fast prune-finetune --dataset ./sentences --method random --keep_ratio 0.25 --seed 1",
        ],
        writes=_WRITES,
    )
    parser.add_argument(
        "--model",
        default="distilbert-base-uncased",
        help="encoder or classifier: a folder or a Hugging Face name (default: distilbert-base-uncased)",
    )
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
    from spectral_fast.study.prune_finetune import as_text, run_prune_finetune

    result = run_prune_finetune(args.model, args.dataset, take(PruneFinetuneOptions, vars(args)), args.out_dir)
    return result, as_text(result)

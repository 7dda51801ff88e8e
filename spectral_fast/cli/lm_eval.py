"""`lm-eval`: an adapter on any task of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from spectral_fast.calibration.options import ModelOptions
from spectral_fast.cli.common import add_command, add_model_flags, warn
from spectral_fast.usage import take


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "lm-eval",
        _run,
        "tasks of lm-evaluation-harness",
        "Runs lm-evaluation-harness on a model with an adapter, by the harness's own vLLM or Hugging Face model, "
        "with the right rank for the adapter. What stands after -- is handed on to the harness. --dry_run prints its"
        " command line. The harness prints its table; it writes files only where --output_path, after --, says so.",
        examples=[
            "spectral-fast lm-eval --base_model meta-llama/Llama-3.1-8B --lora_dir ./edited --tasks commonsense_qa "
            "-- --num_fewshot 5 --output_path results",
            "spectral-fast lm-eval --base_model meta-llama/Llama-3.1-8B --lora_dir ./edited --tasks arc_easy "
            "arc_challenge --dry_run",
        ],
    )
    parser.add_argument("--lora_dir", required=True, help="adapter: a folder or a Hugging Face name")
    parser.add_argument(
        "--tasks", nargs="+", default=["commonsense_qa"], help="names of the harness's tasks (default: commonsense_qa)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the harness's command line and do not run it")
    parser.add_argument(
        "extra", nargs="*", default=[], metavar="-- ARGUMENT", help="what stands after -- goes to the harness as it is"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "hf"),
        default="auto",
        help="model of the harness; auto takes vllm where that package is installed (default: auto)",
    )
    parser.add_argument("--max_lora_rank", type=int, help="largest rank that vllm serves (default: the adapter's)")
    add_model_flags(parser, base_model_required=True)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.evaluation.lm_eval import harness_command, has_vllm, run_lm_eval

    vllm = args.engine == "vllm" or (args.engine == "auto" and has_vllm())
    if not vllm and args.max_lora_rank is not None:
        warn(["--max_lora_rank has no effect: the engine is hf"])
    options = take(ModelOptions, vars(args))
    command = (harness_command if args.dry_run else run_lm_eval)(
        args.base_model,
        resolve(args.lora_dir, options.cache_dir),
        args.tasks,
        options,
        vllm=vllm,
        max_lora_rank=args.max_lora_rank,
        extra=args.extra,
    )
    if args.dry_run:
        return {"command": command}, shlex.join(command)
    return {"command": command, "status": 0}, "lm-evaluation-harness is done; its table is above"

"""`eval`: accuracy of an adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spectral_fast.cli import humaneval
from spectral_fast.cli.common import add_command, add_model_flags, warn
from spectral_fast.options import add_flags, take
from spectral_fast.progress import counter


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    from spectral_fast.evaluation.engines import EngineOptions
    from spectral_fast.evaluation.profiles import PROFILES, EvaluationOptions

    parser = add_command(
        commands,
        "eval",
        _run,
        "evaluate an adapter on GSM8K, on any questions and answers by exact match, or by a profile of HumanEval",
        "spectral-fast eval --base_model meta-llama/Llama-2-7b-hf --lora_dir ./edited --eval_profile paper_math",
    )
    parser.add_argument("--lora_dir", required=True, help="adapter: a folder or a Hugging Face name")
    parser.add_argument("--out_dir", type=Path, help="folder for the results (default: the adapter's)")
    parser.add_argument("--out_json", type=Path, help="write the result to this file, too")
    parser.add_argument("--eval_profile", choices=list(PROFILES), help="named settings; they win over the flags")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling, if any (default: 0)")
    humaneval.add_permission(parser)
    parser.add_argument(
        "--config_src",
        type=Path,
        help="file that says how the adapter came about; its hash is recorded with the result",
    )
    add_flags(parser.add_argument_group("task"), EvaluationOptions)
    add_flags(parser.add_argument_group("engine"), EngineOptions)
    add_model_flags(parser, base_model_required=True)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.calibration.model import ModelOptions
    from spectral_fast.evaluation.adapters import evaluate_adapters
    from spectral_fast.evaluation.engines import EngineOptions
    from spectral_fast.evaluation.profiles import PROFILES, EvaluationOptions
    from spectral_fast.provenance import sha256_file

    if args.eval_profile is not None and PROFILES[args.eval_profile].task == "humaneval":
        return humaneval.run(args)
    if args.eval_profile is not None:
        ignored = [name for name in ("fewshot", "temperature", "max_tokens") if name in vars(args)]
        warn(f"--{name} is ignored: profile {args.eval_profile} sets it" for name in ignored)
    source = None
    if args.config_src is not None:
        source = {"config_src": {"path": str(args.config_src), "sha256": sha256_file(args.config_src)}}
    folder = resolve(args.lora_dir, getattr(args, "cache_dir", None))
    [result] = evaluate_adapters(
        args.base_model,
        {None: folder},
        args.out_dir or folder,
        take(ModelOptions, vars(args)),
        take(EvaluationOptions, vars(args)),
        take(EngineOptions, vars(args)),
        profile=args.eval_profile,
        seed=args.seed,
        meta=source,
        progress=counter,
    ).values()
    if args.out_json is not None:
        args.out_json.parent.mkdir(parents=True, exist_ok=True)
        args.out_json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    right = f"{result['correct']} of {result['total']}, by {result['engine']}"
    text = f"accuracy {result['acc']:.4f} ± {result['standard_error']:.4f} ({right})"
    return result, f"{text}\npredictions: {result['predictions_path']}"

"""`eval`: accuracy of an adapter."""

from __future__ import annotations

import argparse
from typing import Any

from spectral_fast.cli import humaneval
from spectral_fast.cli.common import (
    add_command,
    add_model_flags,
    add_result_flags,
    add_subject_flags,
    evaluated,
    subject,
    warn,
)
from spectral_fast.cli.outputs import GSM8K, HUMANEVAL, OUT_JSON
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.evaluation.profiles import PROFILES, EvaluationOptions
from spectral_fast.options import add_flags
from spectral_fast.usage import take

_WRITES = {
    **HUMANEVAL,
    **GSM8K,
    "eval_config.json": f"{GSM8K['eval_config.json']}; with a profile of HumanEval as `eval-humaneval` has it",
    **OUT_JSON,
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "eval",
        _run,
        "accuracy on GSM8K or on questions of your own",
        "Lets a model, with an adapter or alone, solve problems, and tells how many answers are right, with the "
        "standard error. The problems are those of GSM8K or of a file with question and answer; a profile is a fixed "
        "way to ask, so that results can be compared, and two profiles are of HumanEval. Costs the generation of all "
        "answers: vLLM where it is installed, else transformers. To compare many adapters: `sweep`.",
        examples=[
            "spectral-fast eval --base_model meta-llama/Llama-3.1-8B --lora_dir ./edited --eval_profile paper_math",
            "spectral-fast eval --base_model meta-llama/Llama-3.1-8B --lora_dir ./edited --out_dir ./evaluated "
            "--eval_data problems.jsonl --fewshot 0 --answer_parser harness",
            "spectral-fast eval --base_model meta-llama/Llama-3.1-8B --lora_dir ./edited --out_dir ./programs "
            "--eval_profile greedy_code --allow_code_execution --out_json programs.json",
        ],
        writes=_WRITES,
    )
    add_subject_flags(parser)
    parser.add_argument("--eval_profile", choices=list(PROFILES), help="named settings; they win over the flags")
    add_result_flags(parser, "folder for the results (default: the adapter's, or .)")
    add_flags(parser.add_argument_group("task"), EvaluationOptions)
    add_flags(parser.add_argument_group("engine"), EngineOptions)
    add_model_flags(parser, base_model_required=True)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.eval_profile is not None and PROFILES[args.eval_profile].task == "humaneval":
        return humaneval.run(args)
    if args.eval_profile is not None:
        ignored = [name for name in ("fewshot", "temperature", "max_tokens") if name in vars(args)]
        warn(f"--{name} is ignored: profile {args.eval_profile} sets it" for name in ignored)
    folder = subject(args)
    result = evaluated(args, folder, take(EvaluationOptions, vars(args)))
    right = f"{result['correct']} of {result['total']}, by {result['engine']}"
    text = f"accuracy {result['acc']:.4f} ± {result['standard_error']:.4f} ({right})"
    return result, f"{text}\npredictions: {result['predictions_path']}"

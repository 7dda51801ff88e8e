"""`eval-humaneval`: pass@k of an adapter or of its base model on HumanEval."""

from __future__ import annotations

import argparse
from typing import Any

from spectral_fast.cli.common import (
    add_command,
    add_model_flags,
    add_result_flags,
    add_subject_flags,
    evaluated,
    subject,
    warn,
)
from spectral_fast.cli.outputs import HUMANEVAL, OUT_JSON
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.evaluation.profiles import PROFILES, HumanEvalOptions
from spectral_fast.options import add_flags
from spectral_fast.usage import UsageError, take

_WRITES = {**HUMANEVAL, **OUT_JSON}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "eval-humaneval",
        run,
        "pass@k on HumanEval, in a sandbox",
        "Lets a model, with an adapter or alone, write programs for HumanEval's problems, runs them with the "
        "problems' tests in a sandbox, and tells the unbiased pass@k. Generated programs may be harmful: they run "
        "only with --allow_code_execution, and only where they can be confined. Costs the generation of all "
        "programs, and some 10 ms of processor time to test each.",
        examples=[
            "spectral-fast eval-humaneval --base_model meta-llama/Llama-3.1-8B --lora_dir ./edited --eval_profile "
            "paper_code_main --allow_code_execution",
            "spectral-fast eval-humaneval --base_model meta-llama/Llama-3.1-8B --base_only --out_dir ./base-programs"
            " --n_generations 10 --temperature 0.8 --pass_k 10 --allow_code_execution --out_json base.json",
        ],
        writes=_WRITES,
    )
    add_subject_flags(parser)
    code = [name for name, profile in PROFILES.items() if profile.task == "humaneval"]
    parser.add_argument("--eval_profile", choices=code, help="named settings; they win over the flags")
    add_result_flags(parser, "folder for the results (default: the adapter's, or .)")
    add_flags(parser.add_argument_group("task"), HumanEvalOptions)
    add_flags(parser.add_argument_group("engine"), EngineOptions)
    add_model_flags(parser, base_model_required=True)
    return parser


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Generate, run the tests, and write what came out; also for `eval` with a profile of HumanEval."""
    if not args.allow_code_execution:
        raise UsageError(
            "HumanEval runs programs that a model has written, which may be harmful. They run confined (see "
            "spectral_fast/evaluation/sandbox); say --allow_code_execution to allow it"
        )
    folder = subject(args)
    if args.eval_profile is not None:
        decoding = ("n_generations", "temperature", "top_p", "max_tokens", "stop_words")
        of_questions = ("fewshot", "fewshot_data", "answer_parser", "stop")  # which `eval` has
        ignored = [name for name in decoding + of_questions if name in vars(args)]
        warn(f"--{name} is ignored: profile {args.eval_profile} sets it" for name in ignored)
    options = take(HumanEvalOptions, vars(args))
    result = evaluated(args, folder, options, allow_code_execution=True)
    metric = f"pass@{options.pass_k}"
    any_pass = f"{result['tasks_with_any_pass']} of {result['num_tasks']} problems solved at least once"
    score = f"{metric} {result[metric]:.4f} ± {result['standard_error']:.4f}"
    text = f"{score} ({any_pass}, by {result['engine']}, isolation: {result['isolation']})"
    return result, f"{text}\nresults: {result['results_path']}"

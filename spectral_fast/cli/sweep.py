"""`sweep`: many edits, one probe each, one engine, one table."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command, add_model_flags
from spectral_fast.options import add_flags, take
from spectral_fast.progress import counter


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    from spectral_fast.calibration.probe import CalibrationOptions
    from spectral_fast.evaluation.engines import EngineOptions
    from spectral_fast.evaluation.humaneval import HumanEvalOptions
    from spectral_fast.evaluation.profiles import PROFILES, EvaluationOptions

    parser = add_command(
        commands,
        "sweep",
        _run,
        "make and evaluate many edits, compare them all",
        "Make and evaluate many edits in one engine, compare all with the original and with random edits.",
        examples=["spectral-fast sweep grid.yaml --out_dir ./sweep --base_model meta-llama/Llama-2-7b-hf"],
    )
    parser.add_argument("configs", type=Path, help=".jsonl, a configuration per line; or .yaml, where lists are grids")
    parser.add_argument("--out_dir", required=True, type=Path, help="folder of the sweep; one that was stopped goes on")
    parser.add_argument("--eval_profile", choices=list(PROFILES), help="named settings; they win over the flags")
    parser.add_argument("--controls", type=int, default=5, help="random edits per kind of variant (default: 5)")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="work on a Ray cluster; without ADDRESS, on one here",
    )
    parser.add_argument("--workers", type=int, help="engines at work with --ray (default: one per GPU)")
    parser.add_argument("--allow_code_execution", action="store_true", help="run generated programs (humaneval)")
    task = parser.add_argument_group("task (where a configuration does not say)")
    add_flags(task, EvaluationOptions, HumanEvalOptions)
    add_flags(parser.add_argument_group("engine"), EngineOptions)
    add_model_flags(parser, base_model_required=False)
    add_flags(parser.add_argument_group("calibration"), CalibrationOptions)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.calibration.model import ModelOptions
    from spectral_fast.calibration.probe import CalibrationOptions
    from spectral_fast.evaluation.engines import EngineOptions
    from spectral_fast.sweep import Settings, load_configs, run_sweep
    from spectral_fast.sweep.config import EVALUATIONS, eval_key
    from spectral_fast.sweep.results import as_text
    from spectral_fast.usage import UsageError

    if args.controls < 0 or (args.workers is not None and args.workers < 1):
        raise UsageError("--controls must be 0 or more, --workers 1 or more")
    if args.workers is not None and args.ray is None:
        raise UsageError("--workers needs --ray; without it one engine works here")
    given = vars(args)
    names = {f.name for f in fields(CalibrationOptions)} | {"base_model", "eval_profile"}
    defaults = {name: given[name] for name in names if given.get(name) is not None}
    flags = {f.name for options in EVALUATIONS.values() for f in fields(options)}
    defaults |= {eval_key(name): given[name] for name in flags if name in given}
    configs = load_configs(args.configs, defaults)
    if not args.allow_code_execution and any(config.task == "humaneval" for config in configs):
        raise UsageError("humaneval runs programs that a model wrote: --allow_code_execution, if that is what you want")
    settings = Settings(args.out_dir, take(ModelOptions, given), take(EngineOptions, given), counter=counter)
    result = run_sweep(
        configs,
        settings,
        controls=args.controls,
        ray=args.ray,
        workers=args.workers,
        note=lambda text: print(text, file=sys.stderr),
    )
    return result, as_text(result)

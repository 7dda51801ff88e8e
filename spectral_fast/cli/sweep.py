"""`sweep`: many edits, one probe each, one engine, one table."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from spectral_fast.calibration.options import CalibrationOptions, ModelOptions
from spectral_fast.cli.common import add_command, add_model_flags, warn_of_engine
from spectral_fast.cli.outputs import GSM8K, HUMANEVAL
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.evaluation.profiles import PROFILES, EvaluationOptions, HumanEvalOptions
from spectral_fast.options import add_flags
from spectral_fast.progress import counter
from spectral_fast.usage import take

_WRITES = {
    "report.html": "tables and pictures, in one file; opens without a network",
    "results.json": "lines (of the configurations), runs (score, comparison with the original, config, metrics), "
    "failures, notes",
    "results.jsonl": "a configuration per line: the columns of summary.csv, and hyperparameters",
    "summary.csv": "a configuration per row: task, lora_repo_id, calib_samples, edit_mode, seed, amp_factor, "
    "sup_factor, soft_temperature, soft_pivot_mode, pass@1 (the score, 0 to 1), metric, standard_error, n (problems), "
    "difference, low, high (95 % interval), p_value, p_holm (corrected for all variants), verdict, label, run, notes",
    "summary.tsv": "the same with tabs",
    "summary_table.md": "means over seeds, and each run against the original",
    "ledger.jsonl": "a group of finished runs per line: runs, failures, versions, engine, engine_settings, seconds, "
    "finished; what stands in it is not done again",
    "probes/*/": "what `probe` writes, for each adapter and calibration set",
    "runs/*/config.json": "task, base_model, lora, role, seed, edit_mode, notes, hyperparameters, identity (hashes)",
    "runs/*/metrics.json": "the score as `eval` tells it",
    "runs/*/adapter_ref.txt": "the adapter that was edited",
    "runs/*/adapter/": "what `edit` writes, where keep_adapter is set",
    "kept_adapters/*/*/*/best.json": "by task, adapter and mode, the best adapter that was kept: adapter (its folder), "
    "label, score, standard_error",
    **{f"runs/*/{name}": text for name, text in (HUMANEVAL | GSM8K).items() if name != "eval_config.json"},
    "runs/*/eval_config.json": "as `eval` or `eval-humaneval` writes it",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "sweep",
        _run,
        "make and evaluate many edits, compare them all",
        "Makes many edits of adapters and evaluates them in one engine: each adapter is probed once, then all "
        "variants are compared with the original on the same problems, and with random edits that have their counts "
        "and factors. The configurations are the lines of a .jsonl file, or of a .yaml file whose lists stand for "
        "each of their items. A sweep that was stopped goes on when the same command is given again. The exit status"
        " is 1 if a run failed.",
        examples=[
            "spectral-fast sweep grid.yaml --out_dir ./sweep --base_model meta-llama/Llama-3.1-8B --eval_profile "
            "paper_math",
            "spectral-fast sweep grid.yaml --out_dir ./quick-sweep --base_model meta-llama/Llama-3.1-8B "
            "--max_samples 200 --controls 2 --engine transformers",
            "spectral-fast sweep configs.jsonl --out_dir ./programs-sweep --base_model meta-llama/Llama-3.1-8B "
            "--eval_profile greedy_code --allow_code_execution",
        ],
        writes=_WRITES,
    )
    parser.again = "The same command goes on where this one stopped."
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
    from spectral_fast.sweep import Settings, load_configs, run_sweep
    from spectral_fast.sweep.config import EVALUATIONS, eval_key
    from spectral_fast.sweep.results import as_text
    from spectral_fast.usage import UsageError

    if args.controls < 0 or (args.workers is not None and args.workers < 1):
        raise UsageError("--controls must be at least 0, --workers at least 1")
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
    engine_options = take(EngineOptions, given)
    warn_of_engine(args, engine_options)
    settings = Settings(args.out_dir, take(ModelOptions, given), engine_options, counter=counter)
    result = run_sweep(
        configs,
        settings,
        controls=args.controls,
        ray=args.ray,
        workers=args.workers,
        note=lambda text: print(text, file=sys.stderr),
    )
    return result, as_text(result)

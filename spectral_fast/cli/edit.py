"""`edit`: reweight singular values, write the edited copy, report and evaluate it."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from spectral_fast.adapter.selection import SelectionOptions
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.cli.common import (
    add_adapter_flags,
    add_calibration_flags,
    add_command,
    add_model_flags,
    certainty,
    discard_work,
    run_probe,
    warn,
    warn_of_engine,
    work_dir,
)
from spectral_fast.cli.outputs import COPY, GSM8K, UNFINISHED
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.evaluation.profiles import EvaluationOptions
from spectral_fast.options import add_flags, flag_name
from spectral_fast.policies import POLICIES, Policy, hard_choice
from spectral_fast.progress import bar, counter
from spectral_fast.usage import UsageError, check_inputs_kept, check_report, check_stream, take, unused

SHARED_POLICY_FLAGS = {"seed"}  # accepted with every mode: the seed of the run as a whole

_WRITES = {
    **COPY,
    "spectral_edit_meta.json": "meta (all settings, seeds, hashes of adapter and data, versions, backends, the record "
    "of the probe) and sigma_stats by module: r, mode, g_abs_mean, g_abs_max, sigma0_sum, sigma_new_sum, sigma0_top1, "
    "sigma_new_top1, and counts and factors of the mode",
    "--report FILE": "HTML with the pictures in it: spectra before and after, sensitivities, how certain the choice is",
    "gsm8k_predictions_*.jsonl": f"with --eval_gsm8k, baseline and edited: {GSM8K['gsm8k_predictions.jsonl']}",
    "eval_config_*.json": f"with --eval_gsm8k: {GSM8K['eval_config.json']}",
    "metrics_gsm8k.json": "with --eval_gsm8k: results of both, comparison (difference, interval, p_value, verdict), "
    "meta",
    **UNFINISHED,
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "edit",
        _run,
        "reweight singular values by what the loss says",
        "Reweights the singular values of an adapter: directions on which the loss depends much are amplified and "
        "others suppressed, by the rule of --mode. How much the loss depends on each is measured on the calibration "
        "samples with the base model, a forward and a backward pass per sample, or comes from a folder that `probe` "
        "wrote: that takes seconds and no base model. Writes a copy; the source is not touched. Next: `eval`, and "
        "the same edit with --mode random_index as the control.",
        examples=[
            "spectral-fast edit --base_model meta-llama/Llama-3.1-8B --lora_path ORG/ADAPTER --out_dir ./edited",
            "spectral-fast edit --sensitivity ./probed --lora_path ORG/ADAPTER --out_dir ./smooth --mode smooth_abs "
            "--amp_factor 1.3",
            "spectral-fast edit --mode random_index --seed 1 --lora_path ORG/ADAPTER --out_dir ./control",
            "spectral-fast edit --sensitivity ./probed --lora_path ORG/ADAPTER --out_dir ./judged --report judged.html "
            "--base_model meta-llama/Llama-3.1-8B --eval_gsm8k",
        ],
        writes=_WRITES,
    )
    add_adapter_flags(parser, "folder to write; must be new, or empty")
    parser.add_argument("--sensitivity", type=Path, help="folder that `probe` wrote; then no base model is needed")
    parser.add_argument("--report", type=Path, help="write an HTML report with pictures to this file")
    group = parser.add_argument_group("policy", _own_flags())
    group.add_argument(
        "--mode",
        "--edit_mode",
        default="abs_select",
        choices=list(POLICIES),
        help="rule that makes new singular values of s and g (default: abs_select)",
    )
    add_flags(group, *POLICIES.values())
    add_model_flags(parser, base_model_required=False)
    add_calibration_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_gsm8k", action="store_true", help="evaluate the adapter before and after, on GSM8K or --eval_data"
    )
    add_flags(group, EvaluationOptions, EngineOptions, prefix="eval_")
    return parser


def _own_flags() -> str:
    """Which flags are for which modes."""
    modes = {mode: {f.name: flag_name(f).removeprefix("--") for f in fields(cls)} for mode, cls in POLICIES.items()}
    shared = set.intersection(*map(set, modes.values()))
    lines = (
        textwrap.fill(
            f"{mode}: {', '.join(flags[name] for name in flags if name not in shared)}", 76, subsequent_indent="  "
        )
        for mode, flags in modes.items()
    )
    return "\n".join([f"Each mode takes {', '.join(sorted(shared))} and its own flags:", *lines])


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.edit import edit_adapter
    from spectral_fast.sensitivity import Sensitivity

    policy = _policy(args)
    needs_probe = policy.needs_sensitivity and args.sensitivity is None
    if needs_probe and args.base_model is None:
        raise UsageError(f"mode {args.mode} needs --base_model to measure sensitivities, or --sensitivity from `probe`")
    if args.eval_gsm8k and args.base_model is None:
        raise UsageError("--eval_gsm8k needs --base_model")
    selection = take(SelectionOptions, vars(args))
    adapter, modules = selection.open(resolve(args.lora_path, getattr(args, "cache_dir", None)))
    adapter.check_out_dir(args.out_dir, overwrite=args.overwrite)
    check_inputs_kept(args)
    check_report(args, adapter.path)
    check_stream(args)
    warn([*adapter.warnings, *unused(args, policy, needs_probe)])
    if args.eval_gsm8k:  # its mistakes are better known before the edit
        take(EvaluationOptions, vars(args), prefix="eval_").load()
        warn_of_engine(args, take(EngineOptions, vars(args), prefix="eval_"), prefix="eval_")
    sensitivity = folder = None
    if needs_probe:
        folder = work_dir(args)
        sensitivity = run_probe(args, adapter, modules, take(ModelOptions, vars(args)), folder)
    elif policy.needs_sensitivity:
        sensitivity = Sensitivity.load(args.sensitivity)
    meta = {**asdict(selection), "seed": getattr(args, "seed", 0)}
    edited = edit_adapter(
        adapter,
        policy,
        args.out_dir,
        modules=modules,
        sensitivity=sensitivity,
        meta={**meta, "lora_path": args.lora_path},
        overwrite=args.overwrite,
        progress=bar("edit"),
    )
    if folder is not None:
        discard_work(folder)
    values = sum(len(module.s) for module in edited.values())
    result: dict[str, Any] = {
        "out_dir": str(args.out_dir),
        "mode": args.mode,
        "modules": len(edited),
        "singular_values": values,
        "carried": adapter.carried,
    }
    text = f"edited {len(edited)} modules ({values} singular values, mode {args.mode}) -> {args.out_dir}"
    if needs_probe and sensitivity is not None:
        result |= {key: sensitivity.record.get(key) for key in ("samples_used", "stable", "stability")}
        text = "\n".join([text, *certainty(sensitivity.record)])
    if adapter.carried:
        text += f"\ncarried through unchanged: {len(adapter.carried)} other tensors or modules (named in --json)"
    if args.report is not None:
        from spectral_fast.report import write_report
        from spectral_fast.statistics import Stability

        facts = {"adapter": args.lora_path, "mode": args.mode, **asdict(policy)}
        samples = {} if sensitivity is None or sensitivity.samples is None else sensitivity.samples
        stability = Stability.of({name: samples[name] for name in edited}, hard_choice(policy)) if samples else None
        title = f"{Path(args.lora_path).name}, {args.mode}"
        write_report(args.report, title, edited, facts=facts, stability=stability)
        result["report"] = str(args.report)
        text += f"\nreport: {args.report}"
    if args.eval_gsm8k:
        result["gsm8k"], table = _evaluate_edit(args, adapter.path)
        text += f"\n{table}"
    return result, text


def _policy(args: argparse.Namespace) -> Policy:
    chosen = POLICIES[args.mode]
    own = {f.name for f in fields(chosen)}
    every = {f.name for policy in POLICIES.values() for f in fields(policy)}
    alien = sorted((set(vars(args)) & every) - own - SHARED_POLICY_FLAGS)
    if alien:
        flags = {f.name: flag_name(f) for policy in POLICIES.values() for f in fields(policy)}
        owners = [mode for mode, policy in POLICIES.items() if alien[0] in {f.name for f in fields(policy)}]
        raise UsageError(
            f"{flags[alien[0]]} is a flag of mode {', '.join(owners)}; mode {args.mode} takes "
            + ", ".join(flags[name] for name in sorted(own))
        )
    return take(chosen, vars(args))


def _evaluate_edit(args: argparse.Namespace, source: Path) -> tuple[dict[str, Any], str]:
    """Results of `edit --eval_gsm8k`, in the edited adapter's folder, and the table."""
    from spectral_fast.evaluation.adapters import evaluate_adapters
    from spectral_fast.evaluation.evaluate import write_metrics

    results = evaluate_adapters(
        args.base_model,
        {"baseline": source, "edited": args.out_dir},
        args.out_dir,
        take(ModelOptions, vars(args)),
        take(EvaluationOptions, vars(args), prefix="eval_"),
        take(EngineOptions, vars(args), prefix="eval_"),
        seed=getattr(args, "seed", 0),
        progress=counter,
    )
    meta = {"base_model_id": args.base_model, "lora_path": args.lora_path, "mode": args.mode}
    metrics = write_metrics(results["baseline"], results["edited"], args.out_dir, meta)
    lines = [f"{name:<9} {r['acc']:.4f} ± {r['standard_error']:.4f}" for name, r in results.items()]
    return metrics, "\n".join([*lines, metrics["comparison"]["verdict"]])

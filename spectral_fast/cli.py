"""`spectral-fast …`: flags to calls, results to text or JSON. The only module that prints."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from spectral_fast._version import __version__
from spectral_fast.adapter.selection import SelectionOptions
from spectral_fast.options import add_flags, flag_name, take
from spectral_fast.policies import POLICIES, Policy
from spectral_fast.progress import bar, counter
from spectral_fast.usage import UsageError, check_inputs_kept, check_report, unused

SHARED_POLICY_FLAGS = {"seed"}  # accepted with every mode: the seed of the run as a whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 the task failed, 2 the command line is wrong."""
    # What torch's import has left: looking through it again and again takes a third of a second in a large edit.
    gc.freeze()
    parser = _parser()
    args = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        result, text = args.run(args)
        print(json.dumps(result, indent=2) if args.json else text, flush=True)
        return 1 if result.get("failures") else 0
    except BrokenPipeError:  # the reader went away; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt:
        print(
            f"spectral-fast {args.command}: interrupted; no file or folder is left half-written",
            file=sys.stderr,
        )
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("SPECTRAL_FAST_DEBUG"):
            raise
        print(f"spectral-fast {args.command}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectral-fast",
        description="Measure, edit and evaluate the singular values of LoRA adapters, without retraining.",
    )
    parser.add_argument("--version", action="version", version=f"spectral-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_edit, _add_probe, _add_eval, _add_demo, _add_bench, _add_info):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
        command.set_defaults(parser=command)
    return parser


def _command(commands: Any, name: str, run: Callable[..., Any], help: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_adapter_flags(parser: argparse.ArgumentParser, out_dir: str) -> None:
    parser.add_argument("--lora_path", required=True, help="adapter: a folder or a Hugging Face name")
    parser.add_argument("--out_dir", required=True, type=Path, help=out_dir)
    parser.add_argument("--overwrite", action="store_true", help="replace out_dir if it holds something")
    add_flags(parser.add_argument_group("modules"), SelectionOptions)


def _add_model_flags(parser: argparse.ArgumentParser, *, base_model_required: bool) -> None:
    from spectral_fast.calibration.model import ModelOptions

    group = parser.add_argument_group("base model")
    group.add_argument("--base_model", required=base_model_required, help="folder or Hugging Face name")
    add_flags(group, ModelOptions)


def _add_calibration_flags(parser: argparse.ArgumentParser) -> None:
    from spectral_fast.calibration.probe import CalibrationOptions

    add_flags(parser.add_argument_group("calibration"), CalibrationOptions)


def _add_edit(commands: Any) -> argparse.ArgumentParser:
    from spectral_fast.evaluation.profiles import EvaluationOptions

    parser = _command(
        commands,
        "edit",
        _edit,
        "reweight an adapter's singular values by their sensitivity and write the edited copy",
        "spectral-fast edit --base_model meta-llama/Llama-2-7b-hf --lora_path ORG/ADAPTER --out_dir ./edited",
    )
    _add_adapter_flags(parser, "folder to write; must be new, or empty")
    parser.add_argument("--sensitivity", type=Path, help="folder that `probe` wrote; then no base model is needed")
    parser.add_argument("--report", type=Path, help="write an HTML report with pictures to this file")
    group = parser.add_argument_group("policy (each mode takes only its own flags)")
    group.add_argument(
        "--mode", "--edit_mode", default="abs_select", choices=list(POLICIES), help="(default: abs_select)"
    )
    add_flags(group, *POLICIES.values())
    _add_model_flags(parser, base_model_required=False)
    _add_calibration_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_gsm8k", action="store_true", help="evaluate the adapter before and after on GSM8K")
    add_flags(group, EvaluationOptions, prefix="eval_")
    return parser


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


def _edit(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.edit import edit_adapter
    from spectral_fast.evaluation.profiles import EvaluationOptions
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
    _warn([*adapter.warnings, *unused(args, policy, needs_probe)])
    if args.eval_gsm8k:  # its mistakes are better known before the edit
        take(EvaluationOptions, vars(args), prefix="eval_").load()
    sensitivity = None
    if needs_probe:
        sensitivity = _run_probe(args, adapter, modules)
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
    values = sum(len(module.s) for module in edited.values())
    result: dict[str, Any] = {
        "out_dir": str(args.out_dir),
        "mode": args.mode,
        "modules": len(edited),
        "singular_values": values,
        "carried": adapter.carried,
    }
    text = f"edited {len(edited)} modules ({values} singular values, mode {args.mode}) -> {args.out_dir}"
    if adapter.carried:
        text += f"\ncarried through unchanged: {len(adapter.carried)} other tensors or modules (named in --json)"
    if args.report is not None:
        from spectral_fast.report import write_report

        facts = {"adapter": args.lora_path, "mode": args.mode, **asdict(policy)}
        write_report(args.report, f"{Path(args.lora_path).name}, {args.mode}", edited, facts=facts)
        result["report"] = str(args.report)
        text += f"\nreport: {args.report}"
    if args.eval_gsm8k:
        result["gsm8k"], table = _evaluate_edit(args, adapter.path)
        text += f"\n{table}"
    return result, text


def _run_probe(args: argparse.Namespace, adapter: Any, modules: Any) -> Any:
    from spectral_fast.calibration.model import ModelOptions
    from spectral_fast.calibration.probe import CalibrationOptions, probe

    given = vars(args)
    return probe(
        adapter,
        modules,
        args.base_model,
        take(CalibrationOptions, given),
        take(ModelOptions, given),
        progress=bar("calibrate"),
    )


def _add_probe(commands: Any) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        "probe",
        _probe,
        "measure the sensitivity of an adapter's singular values, for many edits later",
        "spectral-fast probe --base_model meta-llama/Llama-2-7b-hf --lora_path ORG/ADAPTER --out_dir ./probed",
    )
    _add_adapter_flags(parser, "folder for sensitivity.safetensors and .json")
    _add_model_flags(parser, base_model_required=True)
    _add_calibration_flags(parser)
    return parser


def _probe(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.atomic import check_out_dir, replace_directory
    from spectral_fast.sensitivity import RECORD

    selection = take(SelectionOptions, vars(args))
    adapter, modules = selection.open(resolve(args.lora_path, getattr(args, "cache_dir", None)))
    target = {"source": adapter.path, "overwrite": args.overwrite, "marker": RECORD}
    check_out_dir(args.out_dir, **target)
    check_inputs_kept(args)
    _warn(adapter.warnings)
    sensitivity = _run_probe(args, adapter, modules)
    with replace_directory(args.out_dir, **target) as directory:
        sensitivity.save(directory)
    record = sensitivity.record
    text = (
        f"probed {len(modules)} modules on {record['samples_used']} samples ({record['labels']} labelled tokens) "
        f"-> {args.out_dir}\nnext: spectral-fast edit --sensitivity {args.out_dir} --lora_path {args.lora_path} "
        "--out_dir ./edited"
    )
    return {"out_dir": str(args.out_dir), "modules": len(modules), **record}, text


def _evaluate_edit(args: argparse.Namespace, source: Path) -> tuple[dict[str, Any], str]:
    """Results of `edit --eval_gsm8k`, in the edited adapter's folder, and the table."""
    from spectral_fast.calibration.model import ModelOptions
    from spectral_fast.evaluation.adapters import evaluate_adapters
    from spectral_fast.evaluation.evaluate import write_metrics
    from spectral_fast.evaluation.profiles import EvaluationOptions

    results = evaluate_adapters(
        args.base_model,
        {"baseline": source, "edited": args.out_dir},
        args.out_dir,
        take(ModelOptions, vars(args)),
        take(EvaluationOptions, vars(args), prefix="eval_"),
        seed=getattr(args, "seed", 0),
        progress=counter,
    )
    meta = {"base_model_id": args.base_model, "lora_path": args.lora_path, "mode": args.mode}
    metrics = write_metrics(results["baseline"], results["edited"], args.out_dir, meta)
    lines = [f"{name:<9} {r['acc']:.4f} ± {r['standard_error']:.4f}" for name, r in results.items()]
    return metrics, "\n".join([*lines, metrics["comparison"]["verdict"]])


def _add_eval(commands: Any) -> argparse.ArgumentParser:
    from spectral_fast.evaluation.profiles import PROFILES, EvaluationOptions

    parser = _command(
        commands,
        "eval",
        _eval,
        "evaluate an adapter on GSM8K, or on any questions and answers, by exact match",
        "spectral-fast eval --base_model meta-llama/Llama-2-7b-hf --lora_dir ./edited --eval_profile paper_math",
    )
    parser.add_argument("--lora_dir", required=True, help="adapter: a folder or a Hugging Face name")
    parser.add_argument("--out_dir", type=Path, help="folder for the results (default: the adapter's)")
    parser.add_argument("--out_json", type=Path, help="write the result to this file, too")
    parser.add_argument("--eval_profile", choices=list(PROFILES), help="named settings; they win over the flags")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling, if any (default: 0)")
    add_flags(parser.add_argument_group("task"), EvaluationOptions)
    _add_model_flags(parser, base_model_required=True)
    return parser


def _eval(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.calibration.model import ModelOptions
    from spectral_fast.evaluation.adapters import evaluate_adapters
    from spectral_fast.evaluation.profiles import EvaluationOptions

    if args.eval_profile is not None:
        ignored = [name for name in ("fewshot", "temperature", "max_tokens") if name in vars(args)]
        _warn(f"--{name} is ignored: profile {args.eval_profile} sets it" for name in ignored)
    folder = resolve(args.lora_dir, getattr(args, "cache_dir", None))
    [result] = evaluate_adapters(
        args.base_model,
        {None: folder},
        args.out_dir or folder,
        take(ModelOptions, vars(args)),
        take(EvaluationOptions, vars(args)),
        profile=args.eval_profile,
        seed=args.seed,
        progress=counter,
    ).values()
    if args.out_json is not None:
        args.out_json.parent.mkdir(parents=True, exist_ok=True)
        args.out_json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    text = f"accuracy {result['acc']:.4f} ± {result['standard_error']:.4f} ({result['correct']} of {result['total']})"
    return result, f"{text}\npredictions: {result['predictions_path']}"


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        "demo",
        _demo,
        "probe, edit and evaluate the adapter inside the package, and write a report",
        "spectral-fast demo --out_dir demo-output",
    )
    parser.add_argument("--out_dir", type=Path, default=Path("demo-output"), help="(default: demo-output)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in out_dir")
    parser.add_argument("--max_samples", type=int, default=-1, help="held-out problems to solve (default: all 512)")
    return parser


def _demo(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.demo import as_text, run_demo

    result = run_demo(args.out_dir, overwrite=args.overwrite, max_samples=args.max_samples, bar=bar, counter=counter)
    return result, as_text(result)


def _add_bench(commands: Any) -> argparse.ArgumentParser:
    parser = _command(
        commands,
        "bench",
        _bench,
        "check and time every kernel on this GPU, beside what torch offers",
        "spectral-fast bench --device cuda --out_json bench.json",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "interpreter"],
        default="cuda",
        help="interpreter: tiny sizes on the CPU, no times; wants TRITON_INTERPRET=1 (default: cuda)",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only workloads with this in their name")
    parser.add_argument("--out_json", type=Path, default=Path("bench.json"), help="(default: bench.json)")
    return parser


def _bench(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.bench.run import as_text, run
    from spectral_fast.environment import describe

    if args.out_json.exists():
        raise UsageError(f"--out_json {args.out_json} exists; choose another name")
    if not args.out_json.resolve().parent.is_dir():
        raise UsageError(f"--out_json {args.out_json} is in no folder; make {args.out_json.parent} first")
    result = run(args.device, args.only, report=lambda name: print(name, file=sys.stderr, flush=True))
    result["environment"] = describe()
    args.out_json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result, f"{as_text(result)}\n\nwrote {args.out_json}"


def _add_info(commands: Any) -> argparse.ArgumentParser:
    return _command(
        commands, "info", _info, "show versions, devices, and the backend of every op here", "spectral-fast info --json"
    )


def _info(_: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.environment import as_text, describe

    facts = describe()
    return facts, as_text(facts)


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)

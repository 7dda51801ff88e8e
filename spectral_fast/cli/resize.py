"""`resize`: an adapter of another rank."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectral_fast.adapter.patterns import MANY
from spectral_fast.cli.common import EveryModule, add_adapter_flags, add_command, warn
from spectral_fast.cli.outputs import COPY
from spectral_fast.options import add_flags
from spectral_fast.progress import bar
from spectral_fast.toolbox.options import ResizeOptions
from spectral_fast.usage import take

_WRITES = {
    **COPY,
    "resize_meta.json": "meta (all settings, hashes, versions, backends, the record of the probe) and modules: r "
    "(before), kept (directions), error (|ΔW - ΔW'| / |ΔW|), directions (which, if sensitivities chose them)",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "resize",
        _run,
        "change the ranks",
        "Writes a copy of an adapter with other ranks. Of every module the largest singular values are kept or, with"
        " --sensitivity, the directions that matter most to the loss. The goal is a rank, a share of the energy, an "
        "error, or a budget. Works on the factors alone, without a base model: a 7B adapter took 0.7 s on two cores."
        " Tells the relative error of every module. Next: `eval`, or `diff` with the source.",
        examples=[
            "spectral-fast resize --lora_path ORG/ADAPTER --out_dir ./r16 --rank 16",
            "spectral-fast resize --lora_path ORG/ADAPTER --out_dir ./small --error 0.1 --pad",
            "spectral-fast resize --lora_path ORG/ADAPTER --out_dir ./cheap --sensitivity ./probed --budget 0.05",
        ],
        writes=_WRITES,
    )
    add_adapter_flags(parser, "folder to write; must be new, or empty", EveryModule)
    group = parser.add_argument_group("size (one of the first five)")
    add_flags(group, ResizeOptions)
    group.add_argument(
        "--sensitivity",
        type=Path,
        help="folder that `probe` wrote: choose by |s g|, not by s, in the modules that were probed",
    )
    parser.add_argument("--cache_dir", help="cache folder for downloads from the Hugging Face hub")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.sensitivity import Sensitivity
    from spectral_fast.toolbox.resize import resize_adapter
    from spectral_fast.usage import UsageError

    sensitivity = None if args.sensitivity is None else Sensitivity.load(args.sensitivity)
    try:
        options = take(ResizeOptions, vars(args))
        options.check_sensitivity(sensitivity)
    except ValueError as error:
        raise UsageError(str(error)) from error
    selection = take(EveryModule, vars(args))
    adapter, modules = selection.open(resolve(args.lora_path, args.cache_dir))
    warn(adapter.warnings)
    if sensitivity is not None and "target_modules" not in vars(args):  # of which `probe` takes fewer by default
        probed = [module for module in modules if module.name in sensitivity.modules]
        if probed and len(probed) < len(modules):
            warn([f"{len(modules) - len(probed)} modules were not probed, and keep their ranks"])
            modules = probed
    resized = resize_adapter(
        adapter,
        options,
        args.out_dir,
        modules=modules,
        sensitivity=sensitivity,
        meta={**asdict(selection), "lora_path": args.lora_path},
        overwrite=args.overwrite,
        progress=bar("resize"),
    )
    if not options.pad and len({module.kept for module in resized.values()}) > 1 and len(adapter.modules) > MANY:
        count = len(adapter.modules)
        warn([f"PEFT tries each of {count} patterns on every module, for minutes to hours: --pad needs none"])
    before, after = (sum(r * (x.m + x.n) for x, r in zip(modules, ranks, strict=True)) for ranks in _ranks(resized))
    kept = [module.kept for module in resized.values()]
    errors = [module.error for module in resized.values()]
    result = {
        "out_dir": str(args.out_dir),
        "modules": len(resized),
        "rank_least": min(kept),
        "rank_most": max(kept),
        "padded": options.pad,
        "parameters_before": before,
        "parameters": after,
        "error": sum(errors) / len(errors),
        "error_most": max(errors),
        "resized": {name: asdict(module) for name, module in resized.items()},
        "carried": adapter.carried,
    }
    text = (
        f"{len(resized)} modules with {min(kept)} to {max(kept)} directions{', padded to one rank' * options.pad} "
        f"-> {args.out_dir}\n"
        f"parameters: {after:,} of {before:,}, {after / before:.1%}{' (zeros not counted)' * options.pad}\n"
        f"|ΔW - ΔW'| / |ΔW|: {result['error']:.2%} on average, {max(errors):.2%} at most"
    )
    if adapter.carried:
        text += f"\ncarried through unchanged: {len(adapter.carried)} other tensors or modules (named in --json)"
    return result, text


def _ranks(resized: Any) -> tuple[list[int], list[int]]:
    return [module.r for module in resized.values()], [module.kept for module in resized.values()]

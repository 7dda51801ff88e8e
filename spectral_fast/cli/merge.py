"""`merge`: several adapters become one."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectral_fast.adapter.patterns import ALL_LAYERS
from spectral_fast.cli.common import EveryModule, add_command, warn
from spectral_fast.cli.outputs import NEW_ADAPTER
from spectral_fast.options import add_flags, check, option
from spectral_fast.progress import bar
from spectral_fast.toolbox.merging.options import MergeOptions
from spectral_fast.usage import UsageError, take


@dataclass(frozen=True)
class MergeSelection:
    """Which modules are merged; the result has no others."""

    target_modules: tuple[str, ...] = option(
        ("all-linear",), "last name components, or all-linear; others are left out"
    )
    layer_min: int = option(0, "first layer, inclusive", low=0)
    layer_max: int = option(ALL_LAYERS, "last layer, inclusive", low=0, shown="the last")
    adapter_name: str | None = option(None, "which adapter, if the weight files' keys name several")

    def __post_init__(self) -> None:
        check(self)


_WRITES = {
    **NEW_ADAPTER,
    "merge_meta.json": "meta (sources with weights and hashes, all settings, versions, backends) and modules: sources "
    "(numbers of the adapters that have it), r, error (of the truncation, relative), agreement (share of the entries "
    "with the elected sign; null without an election)",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "merge",
        _run,
        "make several adapters one",
        "Merges adapters of any ranks into one: exactly (cat), truncated by singular values (svd), by PEFT's "
        "methods, or in subspaces that all share. Works on the factors alone, without a base model; only the methods"
        " ..._svd other than svd itself form dense matrices, and are slow. Tells the relative error of the "
        "truncation. docs/merging.md says what each method computes. Next: `eval`.",
        examples=[
            "spectral-fast merge --lora_path ORG/ONE ORG/TWO --weights 0.5 0.5 --method svd --rank 16 --out_dir "
            "./merged",
            "spectral-fast merge --lora_path ORG/ONE ORG/TWO --weights 1 1 --method core_ties --density 0.5 "
            "--out_dir ./ties",
            "spectral-fast merge --lora_path ORG/ONE ORG/TWO --weights 1 -1 --method cat --out_dir ./difference",
        ],
        writes=_WRITES,
    )
    # argparse's own knows no exponents before Python 3.14, and takes -1e-3 for a flag.
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    parser.add_argument("--lora_path", required=True, nargs="+", help="adapters: folders or Hugging Face names")
    parser.add_argument("--weights", required=True, nargs="+", type=float, help="what each is multiplied by")
    parser.add_argument("--out_dir", required=True, type=Path, help="folder to write; must be new, or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace out_dir if it holds something")
    add_flags(parser.add_argument_group("modules"), MergeSelection)
    add_flags(parser.add_argument_group("merging"), MergeOptions)
    parser.add_argument("--cache_dir", help="cache folder for downloads from the Hugging Face hub")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.toolbox.merging import merge_adapters

    options, selection = take(MergeOptions, vars(args)), take(MergeSelection, vars(args))
    if len(args.lora_path) != len(args.weights):
        raise UsageError(f"--weights takes one per adapter; got {len(args.weights)} for {len(args.lora_path)}")
    every = EveryModule(**asdict(selection), include_conv=True, include_embedding=True)
    opened = [every.open(resolve(path, args.cache_dir)) for path in args.lora_path]
    sources = [adapter for adapter, _ in opened]
    warn(f"{adapter.path}: {warning}" for adapter in sources for warning in adapter.warnings)
    merged = merge_adapters(
        sources,
        args.weights,
        options,
        args.out_dir,
        modules=[modules for _, modules in opened],
        meta={**asdict(selection), "lora_path": args.lora_path},
        overwrite=args.overwrite,
        progress=bar("merge"),
        warn=warn,
    )
    ranks = sorted({module.r for module in merged.values()})
    worst = max(merged, key=lambda name: merged[name].error)
    votes = [module.agreement for module in merged.values() if module.agreement is not None]
    result = {
        "out_dir": str(args.out_dir),
        "lora_path": args.lora_path,
        "weights": args.weights,
        **asdict(options),
        "ranks": [ranks[0], ranks[-1]],
        "error_mean": sum(module.error for module in merged.values()) / len(merged),
        "error_most": merged[worst].error,
        "agreement": sum(votes) / len(votes) if votes else None,
        "modules": {name: asdict(module) for name, module in merged.items()},
    }
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    text = f"merged {len(sources)} adapters ({options.method}): {len(merged)} modules, {span} -> {args.out_dir}"
    if result["error_most"] >= 5e-5:  # as a percentage, more than 0.00
        text += (
            f"\ntruncated: |ΔW - ΔW'| / |ΔW| is {result['error_mean']:.2%} on average, {result['error_most']:.2%} at "
            f"most, in {worst}"
        )
    if votes:
        text += f"\nof the entries kept, {result['agreement']:.1%} have the sign that was elected"
    return result, text

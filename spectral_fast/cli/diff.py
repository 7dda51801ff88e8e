"""`diff`: two adapters beside each other."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from spectral_fast.cli.common import EveryModule, add_command, warn
from spectral_fast.options import add_flags
from spectral_fast.progress import bar
from spectral_fast.usage import take


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "diff",
        _run,
        "compare two adapters",
        "Compares two adapters, module by module: relative difference and cosine of their updates, overlap of their "
        "leading directions, ranks, scalings and configurations. Works on the factors alone, without a base model. "
        "The exit status is 0 whatever differs, unless --at_most is given: then it is 1 if more does. Writes no "
        "file.",
        examples=[
            "spectral-fast diff ORG/ADAPTER ./r16",
            "spectral-fast diff ORG/ADAPTER ./plain --at_most 1e-3",
        ],
    )
    parser.add_argument("first", help="adapter: a folder or a Hugging Face name")
    parser.add_argument("second", help="the adapter to compare it with")
    parser.add_argument(
        "--at_most",
        type=float,
        help="exit with 1 if |ΔW1 - ΔW2| / max(|ΔW1|, |ΔW2|) of a module is above this, only one adapter has it, or "
        "another tensor differs at all",
    )
    parser.add_argument("--directions", type=int, default=8, help="top directions of the overlaps (default: 8)")
    parser.add_argument(
        "--rows", type=int, default=40, help="lines of the table, largest differences first (default: 40)"
    )
    add_flags(parser.add_argument_group("modules"), EveryModule)
    parser.add_argument("--cache_dir", help="cache folder for downloads from the Hugging Face hub")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.provenance import versions
    from spectral_fast.toolbox.difference import compare_adapters
    from spectral_fast.usage import UsageError

    if args.at_most is not None and not args.at_most >= 0:
        raise UsageError(f"--at_most must be at least 0; got {args.at_most:g}")
    if args.directions < 1:
        raise UsageError(f"--directions must be at least 1; got {args.directions}")
    selection = take(EveryModule, vars(args))
    (first, ones), (second, others) = (selection.open(resolve(x, args.cache_dir)) for x in (args.first, args.second))
    for path, adapter in ((args.first, first), (args.second, second)):
        warn(f"{path}: {warning}" for warning in adapter.warnings)
    found = compare_adapters(first, second, modules=(ones, others), directions=args.directions, progress=bar("diff"))
    relative = [x.relative for x in found.modules.values()]
    result = {
        "first": {"lora_path": args.first, "adapter_sha256": first.fingerprint()},
        "second": {"lora_path": args.second, "adapter_sha256": second.fingerprint()},
        "versions": versions(),
        "modules": {name: asdict(x) for name, x in found.modules.items()},
        "only_first": found.only[0],
        "only_second": found.only[1],
        "shapes": found.shapes,
        "others": found.others,
        "config": found.config,
        "relative_most": max(relative, default=None),
        "at_most": args.at_most,
        "failures": [] if args.at_most is None else found.beyond(args.at_most),
    }
    return result, _text(result, max(0, args.rows))


def _text(result: Mapping[str, Any], rows: int) -> str:
    modules = result["modules"]
    differing = {name: x for name, x in modules.items() if x["relative"]}
    shown = sorted(differing, key=lambda name: -differing[name]["relative"])[:rows]
    lines = []
    if shown:
        short = {name: name.removeprefix("base_model.model.").removeprefix("model.") for name in shown}
        width = max(map(len, short.values()))
        heads = ("relative", "cosine", "overlap U", "overlap V", "r", "scaling")
        lines = [f"{'module':<{width}}" + "".join(f"{head:>15}" for head in heads)]
        for name in shown:
            x = modules[name]
            numbers = (
                "–" if x[key] is None else f"{x[key]:.4g}" for key in ("relative", "cosine", "overlap_u", "overlap_v")
            )
            cells = (*numbers, _both(x["ranks"]), _both(x["scalings"]))
            lines.append(f"{short[name]:<{width}}" + "".join(f"{cell:>15}" for cell in cells))
        if left := len(differing) - len(shown):
            lines.append(f"… {left} more with smaller differences (all by --rows {len(differing)})")
    lines.append(
        f"{len(modules)} modules in both adapters: {len(modules) - len(differing)} with the same factors bit for bit, "
        f"{len(differing)} with others"
    )
    for which in ("first", "second"):
        if names := result[f"only_{which}"]:
            lines.append(f"only in the {which}: {len(names)} modules, e.g. {names[0]}")
    for name, (one, other) in list(result["shapes"].items())[:5]:
        lines.append(f"{name}: {tuple(one)} and {tuple(other)} cannot be compared")
    if names := result["others"]:
        lines.append(f"not the same, beside the modules: {len(names)} tensors, e.g. {names[0]}")
    for key, (one, other) in result["config"].items():
        lines.append(f"{key}: {_shortened(one)} | {_shortened(other)}")
    if result["at_most"] is not None:
        lines.append(f"{len(result['failures'])} modules or tensors are beyond --at_most {result['at_most']:g}")
    return "\n".join(lines)


def _both(pair: Any) -> str:
    one, other = (f"{x:.4g}" for x in pair)
    return one if one == other else f"{one} | {other}"


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

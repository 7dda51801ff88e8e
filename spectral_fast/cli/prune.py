"""`prune`: an adapter without its least rank channels."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from spectral_fast.cli.common import EveryModule, add_adapter_flags, add_command, warn
from spectral_fast.cli.outputs import COPY
from spectral_fast.options import add_flags
from spectral_fast.progress import bar
from spectral_fast.toolbox.options import PruneOptions
from spectral_fast.usage import take

_WRITES = {
    **COPY,
    "channel_prune_meta.json": "meta (all settings, hash of the adapter, versions) and modules: r, kept (numbers of "
    "the channels), energy_kept (share of the energy, 0 to 1)",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "prune",
        _run,
        "keep the best rank channels",
        "Keeps in every module the channels b_k a_k (a column of B and a row of A) with the highest scores and "
        "writes a copy in which the others are zero or, with --compact, left out. Works on the factors alone, "
        "without a base model. To prune by what the loss says: `edit --mode abs_select --sup_factor 0 --noise_frac "
        "0.5 --amp_factor 1 --preserve_energy none`, and then `prune --compact` with the modules of that edit "
        "(--target_modules down_proj o_proj by default): here all modules are pruned unless some are named.",
        examples=[
            "spectral-fast prune --lora_path ORG/ADAPTER --out_dir ./pruned --keep_ratio 0.5 --compact",
            "spectral-fast prune --lora_path ORG/ADAPTER --out_dir ./pruned-at-random --method random --seed 1",
        ],
        writes=_WRITES,
    )
    add_adapter_flags(parser, "folder to write; must be new, or empty", EveryModule)
    group = parser.add_argument_group("pruning")
    add_flags(group, PruneOptions)
    group.add_argument("--compact", action="store_true", help="leave pruned channels out (smaller rank), not zero")
    parser.add_argument("--cache_dir", help="cache folder for downloads from the Hugging Face hub")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.toolbox.prune import prune_adapter

    options, selection = take(PruneOptions, vars(args)), take(EveryModule, vars(args))
    adapter, modules = selection.open(resolve(args.lora_path, args.cache_dir))
    warn(adapter.warnings)
    pruned = prune_adapter(
        adapter,
        options,
        args.out_dir,
        modules=modules,
        compact=args.compact,
        meta={**asdict(selection), "lora_path": args.lora_path},
        overwrite=args.overwrite,
        progress=bar("prune"),
    )
    kept = sum(int(module.kept.sum()) for module in pruned.values())
    channels = sum(len(module.kept) for module in pruned.values())
    shares = [module.energy_kept for module in pruned.values()]
    result = {
        "out_dir": str(args.out_dir),
        "method": options.method,
        "modules": len(pruned),
        "channels": channels,
        "kept": kept,
        "compact": args.compact,
        "energy_kept": sum(shares) / len(shares),
        "energy_kept_least": min(shares),
        "carried": adapter.carried,
    }
    text = (
        f"kept {kept} of {channels} channels in {len(pruned)} modules ({options.method}"
        f"{', left out' if args.compact else ', zeroed'}) -> {args.out_dir}\n"
        f"share of the channels' energy kept: {result['energy_kept']:.1%} on average, {min(shares):.1%} at least"
    )
    if adapter.carried:
        text += f"\ncarried through unchanged: {len(adapter.carried)} other tensors or modules (named in --json)"
    return result, text

"""`clip`: an adapter without spectral spikes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from spectral_fast.cli.common import EveryModule, add_adapter_flags, add_command, warn
from spectral_fast.cli.outputs import COPY
from spectral_fast.options import add_flags
from spectral_fast.progress import bar
from spectral_fast.toolbox.options import ClipOptions
from spectral_fast.usage import take

_WRITES = {
    **COPY,
    "clip_meta.json": "meta (all settings, hash of the adapter, versions, backends) and modules: limit (largest "
    "singular value), clipped (those above it, before), error (|ΔW - ΔW'| / |ΔW|)",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "clip",
        _run,
        "clip spikes in the spectra, to stack adapters",
        "Lowers the singular values that stand above --multiple times the median of their module to that, so that "
        "the adapter can be stacked with others. Modules without such spikes are copied as they are. Works on the "
        "factors alone, without a base model. `inspect` shows the spikes before.",
        examples=[
            "spectral-fast clip --lora_path ORG/ADAPTER --out_dir ./clipped",
            "spectral-fast clip --lora_path ORG/ADAPTER --out_dir ./clipped-hard --multiple 4 --target_modules "
            "o_proj down_proj",
        ],
        writes=_WRITES,
    )
    add_adapter_flags(parser, "folder to write; must be new, or empty", EveryModule)
    add_flags(parser.add_argument_group("clipping"), ClipOptions)
    parser.add_argument("--cache_dir", help="cache folder for downloads from the Hugging Face hub")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import resolve
    from spectral_fast.toolbox.clip import clip_adapter

    options, selection = take(ClipOptions, vars(args)), take(EveryModule, vars(args))
    adapter, modules = selection.open(resolve(args.lora_path, args.cache_dir))
    warn(adapter.warnings)
    clipped = clip_adapter(
        adapter,
        options,
        args.out_dir,
        modules=modules,
        meta={**asdict(selection), "lora_path": args.lora_path},
        overwrite=args.overwrite,
        progress=bar("clip"),
    )
    spiked = {name: asdict(module) for name, module in clipped.items() if module.clipped}
    values = sum(len(module.clipped) for module in clipped.values())
    result = {
        "out_dir": str(args.out_dir),
        "multiple": options.multiple,
        "modules": len(clipped),
        "modules_clipped": len(spiked),
        "values_clipped": values,
        "error_most": max(module.error for module in clipped.values()),
        "clipped": spiked,
        "carried": adapter.carried,
    }
    text = (
        f"clipped {values} singular values in {len(spiked)} of {len(clipped)} modules to {options.multiple:g} times "
        f"their module's median -> {args.out_dir}\n"
        f"|ΔW - ΔW'| / |ΔW|: {result['error_most']:.2%} at most"
    )
    if adapter.carried:
        text += f"\ncarried through unchanged: {len(adapter.carried)} other tensors or modules (named in --json)"
    return result, text

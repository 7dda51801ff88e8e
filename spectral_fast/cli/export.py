"""`export`: an adapter for loaders that know one rank and one scaling."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command, warn
from spectral_fast.cli.outputs import COPY
from spectral_fast.progress import bar

_WRITES = {
    **COPY,
    "export_meta.json": "meta (adapter and its hash, rank, versions) and modules: r (before), scaling (that was "
    "baked), factor (what B and A were multiplied by; null: nothing), error (|ΔW - ΔW'| / |ΔW|)",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "export",
        _run,
        "bake scalings and ranks in, for simple loaders",
        "Writes an adapter that loaders without rank_pattern, alpha_pattern and rsLoRA read right: the scaling of "
        "every module is multiplied into its factors, all modules have one rank (zeros fill it up), and lora_alpha "
        "equals r. ΔW is the same, or rounded to the stored dtype by what is told. Works on the factors alone, "
        "without a base model.",
        examples=[
            "spectral-fast export --bake_scaling --lora_path ORG/ADAPTER --out_dir ./plain",
            "spectral-fast export --bake_scaling --rank 64 --lora_path ORG/ADAPTER --out_dir ./plain64",
        ],
        writes=_WRITES,
    )
    parser.add_argument("--lora_path", required=True, help="adapter: a folder or a Hugging Face name")
    parser.add_argument("--out_dir", required=True, type=Path, help="folder to write; must be new, or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace out_dir if it holds something")
    parser.add_argument(
        "--bake_scaling",
        action="store_true",
        required=True,
        help="multiply factors by their module's scaling; said aloud, since PEFT needs none of it",
    )
    parser.add_argument(
        "--rank", type=int, help="rank of all modules, e.g. one that a loader has kernels for (default: the largest)"
    )
    parser.add_argument("--adapter_name", help="which adapter, if the weight file's keys name several")
    parser.add_argument("--cache_dir", help="cache folder for downloads from the Hugging Face hub")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.adapter import Adapter, resolve
    from spectral_fast.toolbox.export import export_adapter

    adapter = Adapter.open(
        resolve(args.lora_path, args.cache_dir),
        adapter_name=args.adapter_name,
        include_conv=True,
        include_embedding=True,
    )
    warn(warning for warning in adapter.warnings if "scaled by" not in warning)  # which is what is mended here
    baked = export_adapter(
        adapter,
        args.out_dir,
        rank=args.rank,
        meta={"lora_path": args.lora_path},
        overwrite=args.overwrite,
        progress=bar("export"),
    )
    rounded = {name: module.error for name, module in baked.items() if module.error}
    rank = args.rank or max(module.r for module in baked.values())
    result = {
        "out_dir": str(args.out_dir),
        "modules": len(baked),
        "rank": rank,
        "modules_rounded": len(rounded),
        "error_most": max(rounded.values(), default=0.0),
        "baked": {name: asdict(module) for name, module in baked.items()},
        "carried": adapter.carried,
    }
    scalings = sorted({module.scaling for module in baked.values()})
    text = (
        f"{len(baked)} modules of rank {rank}, lora_alpha {rank} -> {args.out_dir}\n"
        f"scalings in the factors: {', '.join(f'{x:.6g}' for x in scalings[:8])}{' …' * (len(scalings) > 8)}\n"
    )
    if rounded:
        text += f"{len(rounded)} modules were rounded: |ΔW - ΔW'| / |ΔW| up to {max(rounded.values()):.2g}"
    else:
        text += "ΔW is the same to the last bit"
    if adapter.carried:
        text += f"\ncarried through unchanged: {len(adapter.carried)} other tensors (named in --json)"
    return result, text

"""`demo`: the main job on the embedded model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command
from spectral_fast.progress import bar, counter


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "demo",
        _run,
        "probe, edit and evaluate on a tiny built-in model",
        "Probe, edit and evaluate the adapter inside the package, and write a report.",
        examples=["spectral-fast demo --out_dir demo-output"],
    )
    parser.add_argument("--out_dir", type=Path, default=Path("demo-output"), help="(default: demo-output)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in out_dir")
    parser.add_argument("--max_samples", type=int, default=-1, help="held-out problems to solve (default: all 512)")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.demo import as_text, run_demo

    result = run_demo(args.out_dir, overwrite=args.overwrite, max_samples=args.max_samples, bar=bar, counter=counter)
    return result, as_text(result)

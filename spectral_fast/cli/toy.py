"""`toy`: reconstructions of random matrices."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command
from spectral_fast.options import add_flags, take
from spectral_fast.progress import bar


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    from spectral_fast.study.options import ToyOptions

    parser = add_command(
        commands,
        "toy",
        _run,
        "reconstruct random matrices from a part of them",
        "Reconstruct random matrices from a part of them: singular triplets, random factors, columns.",
        examples=["spectral-fast toy --n 128 --m 64 --ranks 8 16 32 --trials 200 --outdir toy_results"],
    )
    out = "folder for tables and figures (default: toy_results)"
    parser.add_argument("--outdir", "--out_dir", dest="out_dir", type=Path, default=Path("toy_results"), help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left there")
    add_flags(parser, ToyOptions)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.study.options import ToyOptions
    from spectral_fast.study.toy import as_text, run_toy

    result = run_toy(take(ToyOptions, vars(args)), args.out_dir, overwrite=args.overwrite, progress=bar("toy"))
    return result, as_text(result)

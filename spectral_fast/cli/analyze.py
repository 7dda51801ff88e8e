"""`analyze`: a gated training beside one without a gate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "analyze",
        _run,
        "compare a gated training with one without a gate",
        "Compare a gated training with one without a gate: losses, time and what was accepted, in a report with plots.",
        examples=["spectral-fast analyze --baseline runs/all --slora runs/gated --output reports/analysis.md"],
    )
    parser.add_argument("--baseline", required=True, type=Path, help="folder of the training without a gate")
    parser.add_argument("--slora", required=True, type=Path, help="folder of the gated training")
    default = Path("reports/analysis.md")
    parser.add_argument("--output", type=Path, default=default, help=f"report to write (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.report.gated import analyze

    result = analyze(args.baseline, args.slora, args.output, overwrite=args.overwrite)
    return result, f"{result['verdict']}\n-> {result['output']}"

"""`analyze`: a gated training beside one without a gate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command

_WRITES = {
    "--output FILE": "the report in Markdown",
    "*-loss.png": "beside the report: the losses of both",
    "*-gate.png": "beside the report: what was accepted, and the threshold",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "analyze",
        _run,
        "compare a gated training with one without a gate",
        "Writes a report of a training with the gate of SLoRA beside one without: losses, time, what was accepted, "
        "and whether the losses are within 0.5 % of each other with 30 % of the micro-batches rejected. Reads what "
        "`train` left in both folders; no model is loaded. That does not say that the gate chose well: train once "
        "more with --slora_gate random and the same acceptance.",
        examples=[
            "spectral-fast analyze --baseline ./trained --slora ./gated",
            "spectral-fast analyze --baseline ./trained --slora ./gated --output ./gate.md --overwrite",
        ],
        writes=_WRITES,
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

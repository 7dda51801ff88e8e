"""`info`: what this machine offers."""

from __future__ import annotations

import argparse
from typing import Any

from spectral_fast.cli.common import add_command


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    return add_command(
        commands,
        "info",
        _run,
        "show versions, devices and backends",
        "Tells versions, devices, instruction sets, and which backend every op takes on this machine and why others "
        "refuse. Loads no model and writes no file.",
        examples=[
            "spectral-fast info",
            "SPECTRAL_FAST_BACKEND=reference spectral-fast info --json",
        ],
    )


def _run(_: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.environment import as_text, describe

    facts = describe()
    return facts, as_text(facts)

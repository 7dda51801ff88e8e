"""`bench`: every kernel on this GPU, checked and timed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command
from spectral_fast.usage import UsageError

_WRITES = {
    "--out_json FILE": "device, memory_bytes, card (public peaks), rows (kernel, workload, implementation, state, "
    "median_ms, min_ms, max_ms, repeats, bytes, flops, bytes_per_second, bound_ms), failures, environment",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "bench",
        _run,
        "check and time every kernel on this GPU",
        "Checks every kernel against the reference on this machine's GPU and times it from a cold cache, beside "
        "torch's own. Prints a table and writes the record, to be sent back. Without a GPU, TRITON_INTERPRET=1 and "
        "--device interpreter walk the same path on tiny sizes, without times. The exit status is 1 if a kernel is "
        "wrong.",
        examples=[
            "spectral-fast bench --device cuda --out_json bench.json",
            "TRITON_INTERPRET=1 spectral-fast bench --device interpreter --only batched_svd --out_json tiny.json",
        ],
        writes=_WRITES,
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "interpreter"],
        default="cuda",
        help="interpreter: tiny sizes on the CPU, no times; wants TRITON_INTERPRET=1 (default: cuda)",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only workloads with this in their name")
    parser.add_argument(
        "--out_json",
        type=Path,
        default=Path("bench.json"),
        help="file to write, which must be new (default: bench.json)",
    )
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.bench.run import as_text, run

    if args.out_json.exists():
        raise UsageError(f"--out_json {args.out_json} exists; choose another name")
    if not args.out_json.resolve().parent.is_dir():
        raise UsageError(f"--out_json {args.out_json} is in no folder; make {args.out_json.parent} first")
    result = run(args.device, args.only, report=lambda name: print(name, file=sys.stderr, flush=True))
    args.out_json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result, f"{as_text(result)}\n\nwrote {args.out_json}"

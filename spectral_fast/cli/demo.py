"""`demo`: the main job on the embedded model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command
from spectral_fast.cli.outputs import GSM8K
from spectral_fast.progress import bar, counter

_WRITES = {
    "report.html": "the table of accuracies, the settings and the pictures, in one file",
    "probed/": "what `probe` writes",
    "edited/": "what `edit` writes",
    "control_*/": "what `edit --mode random_index` writes, with seeds 1 and 2",
    "evaluation/gsm8k_predictions_*.jsonl": f"of each adapter: {GSM8K['gsm8k_predictions.jsonl']}",
    "evaluation/eval_config_*.json": f"of each adapter: {GSM8K['eval_config.json']}",
    "pictures/*.png": "those of the report: spectra, sensitivity_by_layer, sensitivity_by_direction, stability",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "demo",
        _run,
        "probe, edit and evaluate on a tiny built-in model",
        "Does the main job on the model inside the package: probes its adapter on 32 problems, edits it, makes two "
        "random controls, solves 512 held-out problems with each, and writes a report. Needs no GPU and no network; "
        "about 100 s of one core, a tenth of it with few --max_samples.",
        examples=[
            "spectral-fast demo",
            "spectral-fast demo --max_samples 16 --out_dir ./quick-demo",
        ],
        writes=_WRITES,
    )
    parser.add_argument(
        "--out_dir", type=Path, default=Path("demo-output"), help="folder to write (default: demo-output)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in out_dir")
    parser.add_argument("--max_samples", type=int, default=-1, help="held-out problems to solve (default: all 512)")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.demo import as_text, run_demo

    result = run_demo(args.out_dir, overwrite=args.overwrite, max_samples=args.max_samples, bar=bar, counter=counter)
    return result, as_text(result)

"""`active-channels`: SparseLoRA's predictor beside an oracle and chance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.calibration.options import CalibrationOptions, ModelOptions
from spectral_fast.cli.common import add_command, add_model_flags
from spectral_fast.options import add_flags
from spectral_fast.progress import bar
from spectral_fast.study.options import ActiveChannelOptions
from spectral_fast.usage import UsageError, check_inputs_kept, take

_WRITES = {
    "active_channels.csv": "a prediction per row: block, layer, part (ffn, qk, vo), sparsity (share left out), "
    "channels, kept, method, recall, energy_kept, energy_oracle (shares, 0 to 1)",
    "active_channels.png": "recall by sparsity, for every part and method",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "active-channels",
        _run,
        "predict active channels from rank-8 factors",
        "Predicts the active channels of a Llama-like model from factors of low rank, as SparseLoRA does, and tells "
        "how many of the truly largest are among them (the recall), beside other predictors and chance. Takes one "
        "forward pass over the samples, with the base model in memory.",
        examples=[
            "spectral-fast active-channels --base_model meta-llama/Llama-3.2-1B --calib_samples 32",
            "spectral-fast active-channels --base_model meta-llama/Llama-3.2-1B --calib_data mine.jsonl --sparsity "
            "0.9 --context_only --out_dir ./active-in-context",
        ],
        writes=_WRITES,
    )
    out = "folder for table and figure (default: active_channel_results)"
    parser.add_argument("--out_dir", type=Path, default=Path("active_channel_results"), help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left there")
    add_flags(parser, ActiveChannelOptions)
    add_flags(parser.add_argument_group("samples"), CalibrationOptions)
    add_model_flags(parser, base_model_required=True)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.study.active_channels import as_text, run_active_channels

    given = vars(args)
    for flag in ("until_stable", "load_in_4bit", "device_map"):
        if flag in given:
            raise UsageError(f"--{flag} has no meaning here; leave it out")
    check_inputs_kept(args)
    result = run_active_channels(
        args.base_model,
        take(CalibrationOptions, given),
        take(ActiveChannelOptions, given),
        args.out_dir,
        model_options=take(ModelOptions, given),
        overwrite=args.overwrite,
        progress=bar("batches"),
    )
    return result, as_text(result)

"""`predictors`: reconstructions of a model's weights."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command, warn
from spectral_fast.options import add_flags, take
from spectral_fast.progress import bar


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    from spectral_fast.study.options import PredictorOptions

    parser = add_command(
        commands,
        "predictors",
        _run,
        "reconstruct a model's weights from a part of them",
        "Reconstruct the weights of a model from a part of them: singular triplets, random factors, columns, rows.",
        examples=["spectral-fast predictors --model distilbert-base-uncased --rank 8 --run_experiment"],
    )
    parser.add_argument("--model", default="distilbert-base-uncased", help="(default: distilbert-base-uncased)")
    out = "folder for table and figures (default: predictor_results)"
    parser.add_argument("--out_dir", type=Path, default=Path("predictor_results"), help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left there")
    add_flags(parser, PredictorOptions)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.study.options import PredictorOptions
    from spectral_fast.study.predictors import as_text, run_predictors

    options = take(PredictorOptions, vars(args))
    result = run_predictors(args.model, options, args.out_dir, overwrite=args.overwrite, progress=bar("predictors"))
    warn(result["warnings"])
    text = as_text(result)
    result["rows"] = [{key: _finite(value) for key, value in row.items()} for row in result["rows"]]
    return result, text


def _finite(value: Any) -> Any:
    """None for what JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

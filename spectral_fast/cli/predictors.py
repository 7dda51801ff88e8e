"""`predictors`: reconstructions of a model's weights."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command, warn
from spectral_fast.options import add_flags
from spectral_fast.progress import bar
from spectral_fast.study.options import PredictorOptions
from spectral_fast.usage import take

_WRITES = {
    "layer_reconstruction.csv": "a matrix per row: param, shape, skipped (if one was too large), seed, n, m, k_used, "
    "relative errors svd_topk_err, rand_svd_subspace_err, random_AB_err, leverage_col_err, mag_col_err, mag_row_err, "
    "mag_best_err, then topk_energy (share, 0 to 1), fro_norm, sizes params_svd_topk, params_random_AB, nnz_mag_col, "
    "nnz_mag_row, milliseconds svd_ms, recon_ms, rand_sub_ms, rand_ab_ms, leverage_ms, mag_ms, and "
    "top_singular_values, stat_leverage_col_err",
    "svd_*.png": "the singular values of each matrix",
    "exp_*_comparison.png": "with --run_experiment: the matrix beside its reconstructions",
    "exp_*_errors.png": "with --run_experiment: their errors",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "predictors",
        _run,
        "reconstruct a model's weights from a part of them",
        "Reconstructs the weight matrices of a model from a part of them (singular triplets, random factors, "
        "columns, rows) and tells the relative errors, a row per matrix. --run_experiment draws one matrix beside "
        "its reconstructions. All 40 matrices of MiniLM took 1 s on one core.",
        examples=[
            "spectral-fast predictors --model distilbert-base-uncased --rank 8 --run_experiment",
            "spectral-fast predictors --model meta-llama/Llama-3.1-8B --max_elems 50000000 --max_layers 20 --out_dir"
            " ./predictors-llama",
        ],
        writes=_WRITES,
    )
    parser.add_argument(
        "--model",
        default="distilbert-base-uncased",
        help="folder or Hugging Face name (default: distilbert-base-uncased)",
    )
    out = "folder for table and figures (default: predictor_results)"
    parser.add_argument("--out_dir", type=Path, default=Path("predictor_results"), help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left there")
    add_flags(parser, PredictorOptions)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
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

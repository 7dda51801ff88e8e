"""`toy`: reconstructions of random matrices."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command
from spectral_fast.options import add_flags
from spectral_fast.progress import bar
from spectral_fast.study.options import ToyOptions
from spectral_fast.usage import take

_WRITES = {
    "toy_results_per_trial.csv": "a matrix per row: seed, trial, n, m, rank_requested, rank_used, k_ratio, relative "
    "errors svd_topk_err, random_AB_err, rand_svd_subspace_err, leverage_col_err, random_colprune_err, sizes "
    "params_svd_topk, params_random_AB, nnz_svd_col, then topk_energy (share, 0 to 1), stat_leverage_col_err",
    "toy_results_agg.csv": "a rank per row: rank_used, and mean and std of each error: svd_topk_err_mean, "
    "svd_topk_err_std, random_AB_err_mean, random_AB_err_std, rand_svd_subspace_err_mean, rand_svd_subspace_err_std, "
    "leverage_col_err_mean, leverage_col_err_std, random_colprune_err_mean, random_colprune_err_std, "
    "stat_leverage_col_err_mean, stat_leverage_col_err_std",
    "rank_k_comparison.png": "errors of triplets and factors by rank",
    "column_prune_comparison.png": "errors of columns by rank",
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "toy",
        _run,
        "reconstruct random matrices from a part of them",
        "Reconstructs random matrices from a part of them (singular triplets, random factors, columns) and tells the "
        "relative errors: what each way of choosing is worth where nothing is to be found. Needs no model.",
        examples=[
            "spectral-fast toy",
            "spectral-fast toy --n 256 --m 128 --ranks 4 8 --trials 50 --out_dir ./toy-large",
        ],
        writes=_WRITES,
    )
    out = "folder for tables and figures (default: toy_results)"
    parser.add_argument("--outdir", "--out_dir", dest="out_dir", type=Path, default=Path("toy_results"), help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left there")
    add_flags(parser, ToyOptions)
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.study.toy import as_text, run_toy

    result = run_toy(take(ToyOptions, vars(args)), args.out_dir, overwrite=args.overwrite, progress=bar("toy"))
    return result, as_text(result)

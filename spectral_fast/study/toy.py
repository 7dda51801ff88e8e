"""`toy`: random matrices, reconstructed from singular triplets, random factors, or some of their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from spectral_fast.atomic import replace_directory
from spectral_fast.study.options import ToyOptions
from spectral_fast.study.output import COLOURS, MARKS, draw, to_csv
from spectral_fast.study.reconstruction import Matrix, error_of_keeping, error_of_product, largest

Row = dict[str, Any]
PER_TRIAL, AGGREGATED = "toy_results_per_trial.csv", "toy_results_agg.csv"
RANK_METRICS = ("svd_topk_err", "random_AB_err", "rand_svd_subspace_err")
COLUMN_METRICS = ("leverage_col_err", "random_colprune_err", "stat_leverage_col_err")


def run_toy(
    options: ToyOptions,
    out_dir: Path | str,
    *,
    overwrite: bool = False,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """Write the table of all trials, that of their means, and two figures.

    For each rank and trial, in this order, one generator draws W (n, m), A (n, k) and B (k, m), all standard normal, a
    permutation of the min(n, m) singular triplets, and k columns. One decomposition serves all errors of a trial.

    Args:
        options: sizes and seed.
        out_dir: folder for the files; appears when all are complete.
        overwrite: replace what an earlier run left there.
        progress: wraps the list of trials.

    Returns:
        `rows` of the aggregated table, and whether svd_topk < rand_svd_subspace < random_AB `ordered` in each.

    Raises:
        FileExistsError: out_dir holds something and `overwrite` is false.

    Example:
        >>> from spectral_fast.study import ToyOptions, run_toy
        >>> result = run_toy(ToyOptions(n=16, m=8, ranks=(2, 4), trials=5), "toy_results")
        >>> result["ordered"], [row["rank_used"] for row in result["rows"]]
        (True, [2, 4])
    """
    with replace_directory(out_dir, overwrite=overwrite, marker=PER_TRIAL) as folder:
        trials = list(_trials(options, progress))
        means = _aggregated(trials)
        (folder / PER_TRIAL).write_text(to_csv(list(trials[0]), trials), encoding="utf-8")
        (folder / AGGREGATED).write_text(to_csv(list(means[0]), means), encoding="utf-8")
        for name, metrics in (("rank_k", RANK_METRICS), ("column_prune", COLUMN_METRICS)):
            draw(folder / f"{name}_comparison.png", (6.4, 4.2), lambda figure, m=metrics: _errors(figure, means, m))  # type: ignore[misc]
    ordered = all(
        row["svd_topk_err_mean"] < row["rand_svd_subspace_err_mean"] < row["random_AB_err_mean"] for row in means
    )
    return {"out_dir": str(out_dir), "ordered": ordered, "rows": means}


def _trials(options: ToyOptions, progress: Callable[[Sequence[int]], Iterable[int]]) -> Iterator[Row]:
    n, m, rng = options.n, options.m, np.random.default_rng(options.seed)
    trials = [(rank, trial) for rank in options.ranks for trial in range(options.trials)]
    for index in progress(range(len(trials))):
        rank, trial = trials[index]
        k = min(rank, n, m)
        w = rng.normal(size=(n, m))
        a, b = rng.normal(size=(n, k)), rng.normal(size=(k, m))
        triplets = rng.permutation(min(n, m))[:k]
        random_columns = rng.choice(m, k, replace=False)
        matrix, columns = Matrix.of(w), np.square(w).sum(0)
        leverage = np.square(matrix.right(k)).sum(0)
        yield {
            "seed": options.seed,
            "trial": trial,
            "n": n,
            "m": m,
            "rank_requested": rank,
            "rank_used": k,
            "k_ratio": k / min(n, m),
            "svd_topk_err": error_of_keeping(matrix.energies, np.arange(k)),
            "random_AB_err": error_of_product(w, a, b),
            "rand_svd_subspace_err": error_of_keeping(matrix.energies, triplets),
            # Σ_i s_i² V_ij², called leverage in the study, is the squared norm of column j.
            "leverage_col_err": error_of_keeping(columns, largest(columns, k)),
            "random_colprune_err": error_of_keeping(columns, random_columns),
            "params_svd_topk": n * k + k * m + k,
            "params_random_AB": n * k + k * m,
            "nnz_svd_col": n * k,
            "topk_energy": float(matrix.energies[:k].sum() / matrix.energies.sum()),
            "stat_leverage_col_err": error_of_keeping(columns, largest(leverage, k)),
        }


def _aggregated(trials: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation (ddof = 1) of every error, by the rank that was used."""
    rows = []
    for k in sorted({trial["rank_used"] for trial in trials}):
        row: Row = {"rank_used": k}
        for metric in (*RANK_METRICS, *COLUMN_METRICS):
            values = np.array([trial[metric] for trial in trials if trial["rank_used"] == k])
            row |= {f"{metric}_mean": float(values.mean()), f"{metric}_std": float(values.std(ddof=1))}
        rows.append(row)
    return rows


def _errors(figure: Figure, rows: Sequence[Row], metrics: Sequence[str]) -> None:
    panel = figure.subplots()
    ranks = [row["rank_used"] for row in rows]
    for metric, colour, mark in zip(metrics, COLOURS, MARKS, strict=False):
        means, stds = ([row[f"{metric}_{what}"] for row in rows] for what in ("mean", "std"))
        panel.errorbar(
            ranks, means, stds, label=metric.removesuffix("_err"), color=colour, marker=mark, capsize=2, lw=1
        )
    panel.set_xticks(ranks)
    panel.set_xlabel("k")
    panel.set_ylabel("‖W − H‖ / ‖W‖")
    panel.legend()


def as_text(result: Mapping[str, Any]) -> str:
    """The means as a table, and whether they are in the expected order."""
    names = [metric.removesuffix("_err") for metric in (*RANK_METRICS, *COLUMN_METRICS)]
    lines = ["   k  " + "  ".join(f"{name:>19}" for name in names)]
    for row in result["rows"]:
        cells = (f"{row[f'{name}_err_mean']:.7f} ± {row[f'{name}_err_std']:.7f}" for name in names)
        lines.append(f"{row['rank_used']:4}  " + "  ".join(f"{cell:>19}" for cell in cells))
    verdict = "holds at every k" if result["ordered"] else "does NOT hold at every k"
    return "\n".join([*lines, f"svd_topk < rand_svd_subspace < random_AB {verdict}", f"-> {result['out_dir']}"])

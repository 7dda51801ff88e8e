"""`predictors`: the weights of a model, reconstructed from singular triplets, random factors, columns or rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectral_fast.atomic import replace_directory
from spectral_fast.calibration.model import from_pretrained
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.study.options import PredictorOptions
from spectral_fast.study.output import file_name, to_csv
from spectral_fast.study.pictures import comparison, error_bars, singular_values
from spectral_fast.study.reconstruction import Floats, Indices, Matrix, error_of_keeping, error_of_product, largest

Row = dict[str, Any]
Progress = Callable[[Sequence[str]], Iterable[str]]
TABLE = "layer_reconstruction.csv"
ERRORS = (
    "svd_topk_err",
    "rand_svd_subspace_err",
    "random_AB_err",
    "leverage_col_err",
    "mag_col_err",
    "mag_row_err",
    "mag_best_err",
)
TIMES = ("svd_ms", "recon_ms", "rand_sub_ms", "rand_ab_ms", "leverage_ms", "mag_ms")
COLUMNS = (
    *("param", "shape", "skipped", "seed", "n", "m", "k_used"),
    *ERRORS,
    *("topk_energy", "fro_norm", "params_svd_topk", "params_random_AB", "nnz_mag_col", "nnz_mag_row"),
    *TIMES,
    *("top_singular_values", "stat_leverage_col_err"),
)
SUMMARY = ("svd_topk_err", "rand_svd_subspace_err", "random_AB_err", "mag_best_err")


def run_predictors(
    model: Path | str,
    options: PredictorOptions,
    out_dir: Path | str,
    *,
    overwrite: bool = False,
    progress: Progress = iter,
) -> dict[str, Any]:
    """Write a table of reconstruction errors of a model's matrices, their singular values, and perhaps the experiment.

    Args:
        model: folder or Hugging Face name, for transformers' `AutoModel`.
        options: what to inspect.
        out_dir: folder for the files; appears when all are complete.
        overwrite: replace what an earlier run left there.
        progress: wraps the names of the parameters.

    Returns:
        `rows` of the table, `summary` with mean and median of the errors over the finite rows, the `experiment`, and
        `warnings`.

    Raises:
        FileNotFoundError: there is no such model.
        FileExistsError: out_dir holds something and `overwrite` is false.
        ValueError: the model has no two-dimensional parameter, or none of the name `experiment_param`, or that has NaN
            or infinity; or out_dir and the model's folder contain each other.

    Example:
        >>> from spectral_fast import embedded
        >>> from spectral_fast.study import PredictorOptions, run_predictors
        >>> options = PredictorOptions(rank=8, max_layers=2)
        >>> result = run_predictors(embedded.base_model_dir(), options, "predictor_results")
        >>> [row["param"] for row in result["rows"]]
        ['embed_tokens.weight', 'layers.0.self_attn.q_proj.weight']
    """
    model = str(model)
    source = Path(model) if Path(model).is_dir() else None
    with replace_directory(out_dir, overwrite=overwrite, source=source, marker=TABLE) as folder:
        parameters, warnings = load_matrices(model, options.seed)
        inspected = list(parameters)[: options.max_layers]
        fitting = [name for name in inspected if parameters[name].numel() <= options.max_elems]
        chosen = _experiment_param(model, options, parameters, fitting) if options.run_experiment else None
        rows = []
        for count, name in enumerate(progress(inspected), start=1):
            shape = "x".join(map(str, parameters[name].shape))
            if name not in fitting:
                rows.append({"param": name, "shape": shape, "skipped": True})
                continue
            w = as_array(parameters[name])
            row, matrix = _inspect(w, options, count)
            if not math.isfinite(row["fro_norm"]):
                warnings.append(f"{name} has NaN or infinite values: so are its errors")
            elif not math.isclose(float(matrix.energies.sum()), row["fro_norm"] ** 2, rel_tol=1e-3, abs_tol=1e-6):
                warnings.append(f"{name}: the squared singular values do not add up to the squared norm")
            rows.append({"param": name, "shape": shape, **row})
            singular_values(folder / f"svd_{file_name(name)}.png", name, matrix.s)
        skipped = any(row.get("skipped") for row in rows)
        (folder / TABLE).write_text(to_csv([c for c in COLUMNS if skipped or c != "skipped"], rows), encoding="utf-8")
        experiment = None
        if chosen is not None:
            experiment = _experiment(folder, chosen, as_array(parameters[chosen]), options)
    return {
        "out_dir": str(out_dir),
        "model": model,
        "rows": rows,
        "summary": _summary(rows),
        "experiment": experiment,
        "warnings": warnings,
    }


def load_matrices(model: str, seed: int) -> tuple[dict[str, Tensor], list[str]]:
    """The two-dimensional parameters of a model in the order of `named_parameters`, and warnings.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it has no matrices.
    """
    from transformers import AutoModel

    torch.manual_seed(seed)  # for what the checkpoint lacks
    loaded, told = from_pretrained(AutoModel, model, ModelOptions(), output_loading_info=True, dtype="auto")
    found = {name: p.detach() for name, p in loaded.named_parameters() if p.ndim == 2}
    if not found:
        raise ValueError(f"{model} has no two-dimensional parameter")
    random = sorted(set(found) & set(told["missing_keys"]))
    return found, [f"{name} is not in the checkpoint: its values are random" for name in random]


def as_array(parameter: Tensor) -> NDArray[np.float32]:
    """A parameter as float32 on the CPU."""
    array: NDArray[np.float32] = parameter.float().cpu().numpy()
    return array


def _experiment_param(
    model: str, options: PredictorOptions, parameters: Mapping[str, Tensor], fitting: Sequence[str]
) -> str:
    name = options.experiment_param
    if name and name not in parameters:
        raise ValueError(
            f"--experiment_param {name!r} is no two-dimensional parameter of {model}; it has {', '.join(parameters)}"
        )
    if not name and not fitting:
        raise ValueError(f"no parameter of {model} has at most --max_elems {options.max_elems} elements")
    name = name or fitting[-1]
    if not parameters[name].isfinite().all():
        raise ValueError(f"{name} of {model} has NaN or infinite values; choose another --experiment_param")
    return name


def _inspect(w: NDArray[np.float32], options: PredictorOptions, count: int) -> tuple[Row, Matrix]:
    n, m = w.shape
    k = min(options.rank, n, m)
    times: dict[str, float] = {}
    with _timed(times, "svd_ms"):
        matrix = Matrix.of(w)
    with _timed(times, "recon_ms"):
        svd = error_of_keeping(matrix.energies, np.arange(k))
    triplets, a, b = _drawn(options.seed + count, n, m, k)
    with _timed(times, "rand_sub_ms"):
        subspace = error_of_keeping(matrix.energies, triplets)
    with _timed(times, "rand_ab_ms"):
        product = error_of_product(matrix.w, a, b)
    columns, rows = _energies(matrix.w, 0), _energies(matrix.w, 1)
    wide = min(options.rank, m)  # the study keeps so many by leverage, also where a matrix has fewer rows than that
    with _timed(times, "leverage_ms"):
        by_leverage = error_of_keeping(columns, largest(columns, wide))  # Σ_i s_i² V_ij²: the squared norm of column j
        statistical = error_of_keeping(columns, largest(np.square(matrix.right(k)).sum(0), wide))
    with _timed(times, "mag_ms"):
        by_column = error_of_keeping(columns, largest(columns, k))
        by_row = error_of_keeping(rows, largest(rows, k))
    total = float(matrix.energies.sum())
    return (
        {
            "seed": options.seed,
            "n": n,
            "m": m,
            "k_used": k,
            "svd_topk_err": svd,
            "rand_svd_subspace_err": subspace,
            "random_AB_err": product,
            "leverage_col_err": by_leverage,
            "mag_col_err": by_column,
            "mag_row_err": by_row,
            "mag_best_err": min(by_column, by_row),
            "topk_energy": float(matrix.energies[:k].sum()) / total if total else 0.0,
            "fro_norm": math.sqrt(float(columns.sum())),
            "params_svd_topk": n * k + k * m,
            "params_random_AB": n * k + k * m,
            "nnz_mag_col": n * k,
            "nnz_mag_row": m * k,
            **times,
            "top_singular_values": ",".join(f"{s:.3e}" for s in matrix.s[:10]),
            "stat_leverage_col_err": statistical,
        },
        matrix,
    )


def _drawn(seed: int, n: int, m: int, k: int) -> tuple[Indices, Floats, Floats]:
    """K random triplets, and random factors (n, k) and (k, m) rounded to float32: in this order, from one generator."""
    rng = np.random.default_rng(seed)
    triplets = rng.permutation(min(n, m))[:k]
    a, b = (rng.normal(size=size).astype(np.float32).astype(np.float64) for size in ((n, k), (k, m)))
    return triplets, a, b


def _energies(w: Floats, axis: int) -> Floats:
    norms: Floats = np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", w, w)
    return norms


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = perf_counter()
    yield
    times[name] = 1e3 * (perf_counter() - start)


def _experiment(folder: Path, name: str, w: NDArray[np.float32], options: PredictorOptions) -> Row:
    """One matrix beside what is left of it when a share `keep_ratio` of it is kept, in two figures."""
    n, m = w.shape
    k = max(1, int(min(n, m) * options.keep_ratio))
    exact = w.astype(np.float64)
    u, s, vh = np.linalg.svd(exact, full_matrices=False)
    triplets, a, b = _drawn(options.seed, n, m, k)
    product = a @ b
    columns, rows = largest(_energies(exact, 0), k), largest(_energies(exact, 1), k)
    kept = {
        "svd_topk": (u[:, :k] * s[:k]) @ vh[:k],
        "rand_svd_subspace": (u[:, triplets] * s[triplets]) @ vh[triplets],
        "random_AB": product * (np.linalg.norm(exact) / np.linalg.norm(product)),
        "leverage_col": _only(exact, columns, 1),
        "mag_col": _only(exact, columns, 1),
        "mag_row": _only(exact, rows, 0),
    }
    norm = float(np.linalg.norm(exact)) or 1.0
    errors = {f"{key}_err": float(np.linalg.norm(exact - h)) / norm for key, h in kept.items()}
    best = "mag_col" if errors["mag_col_err"] <= errors["mag_row_err"] else "mag_row"
    panels = {"original": exact} | {key: h for key, h in kept.items() if not key.startswith("mag_")}
    stem = f"exp_{file_name(name)}"
    comparison(folder / f"{stem}_comparison.png", f"{name}, k = {k}", panels | {f"best magnitude: {best}": kept[best]})
    error_bars(folder / f"{stem}_errors.png", f"{name}, k = {k}", errors)
    return {"param": name, "k": k, **errors}


def _only(w: Floats, kept: Indices, axis: int) -> Floats:
    """W with all but some of its columns (axis 1) or rows (axis 0) zero."""
    mask = np.zeros(w.shape[axis])
    mask[kept] = 1.0
    return w * (mask if axis == 1 else mask[:, None])


def _summary(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Mean and median of some errors, over the rows in which all of them are finite."""
    finite = [row for row in rows if all(math.isfinite(row.get(name, math.nan)) for name in SUMMARY)]
    if not finite:
        return {}
    values = {name: [row[name] for row in finite] for name in SUMMARY}
    return {name: {"mean": fmean(some), "median": median(some)} for name, some in values.items()}


def as_text(result: Mapping[str, Any]) -> str:
    """The summary, and the experiment's errors."""
    inspected = [row for row in result["rows"] if not row.get("skipped")]
    lines = [f"{len(inspected)} matrices of {result['model']} -> {result['out_dir']}"]
    if len(inspected) < len(result["rows"]):
        lines[0] += f" ({len(result['rows']) - len(inspected)} skipped: more than --max_elems elements)"
    for name, of in result["summary"].items():
        lines.append(f"{name:>22}  mean {of['mean']:.4f}  median {of['median']:.4f}")
    if result["experiment"] is not None:
        lines.append(f"experiment on {result['experiment']['param']}, k = {result['experiment']['k']}")
        lines += [f"{key:>22}  {v:.4f}" for key, v in result["experiment"].items() if key.endswith("_err")]
    return "\n".join(lines)

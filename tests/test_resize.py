"""Adapters of another rank: the nearest ones, or the directions that matter most, and what PEFT makes of them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import files, handmade
from safetensors.torch import load_file
from toolbox_tools import IGNORE, PREFIX, in_peft, many, odd, peft_adapter, sensitivities, update

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.cli import main
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity
from spectral_fast.toolbox.resize import META, ResizeOptions, resize_adapter

Q, ZERO, WIDE = f"{PREFIX}.0.self_attn.q_proj", f"{PREFIX}.1.mlp.down_proj", f"{PREFIX}.0.mlp.router"


def truncated(w: torch.Tensor, k: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def rounding(folder: Path) -> dict[str, float]:
    """Module -> a bound on what rounding both factors to their dtype, entry by entry, does to ΔW in Frobenius norm.

    ‖δB A‖ + ‖B δA‖ ≤ 2 u ‖B‖ ‖A‖, and for float32 what the SVD's contract allows, 30 r ε, besides.
    """
    adapter = Adapter.open(folder)
    found = {}
    for name, x in adapter.modules.items():
        b, a = (t.double().norm().item() for t in adapter.read(x))
        eps = torch.finfo(x.dtype).eps if x.dtype != torch.float64 else torch.finfo(torch.float64).eps
        svd = torch.finfo(torch.float32).eps if x.dtype != torch.float64 else eps
        found[name] = abs(x.scaling) * b * a * (eps + 30 * x.r * svd)
    return found


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_each_module_becomes_the_nearest_of_the_rank_in_its_own_dtype(
    tmp_path: Path, dtype: torch.dtype, rslora: bool
) -> None:
    source = Adapter.open(odd(tmp_path / "source", dtype, use_rslora=rslora))
    resized = resize_adapter(source, ResizeOptions(rank=2), tmp_path / "out")
    before, after, bounds = update(tmp_path / "source"), update(tmp_path / "out"), rounding(tmp_path / "out")
    for name, module in Adapter.open(tmp_path / "out").modules.items():
        assert module.r == resized[name].kept == 2
        assert module.dtype == dtype
        assert module.scaling == pytest.approx(source.modules[name].scaling, rel=1e-12)
        nearest = truncated(before[name], 2)
        assert (after[name] - nearest).norm() <= bounds[name]
        norm = before[name].norm()
        error = (before[name] - nearest).norm() / norm if norm else torch.tensor(0.0)
        assert resized[name].error == pytest.approx(error.item(), abs=1e-5)
    assert resized[ZERO].error == 0


def test_modules_of_a_smaller_rank_keep_theirs_and_their_bytes(tmp_path: Path) -> None:
    source = Adapter.open(odd(tmp_path / "source", torch.bfloat16))
    resized = resize_adapter(source, ResizeOptions(rank=5), tmp_path / "out")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("source", "out"))
    assert {x.kept for x in resized.values()} == {4, 5}
    kept = [key for key in old if "self_attn" in key]
    assert kept
    assert all(torch.equal(old[key], new[key]) for key in kept)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"]["model.layers.0.mlp.router"] == 5


@pytest.mark.parametrize(("goal", "share"), [({"energy": 0.8}, 0.2), ({"error": 0.3}, 0.09), ({"energy": 1.0}, 0.0)])
def test_energy_and_error_take_the_smallest_rank_that_will_do(
    tmp_path: Path, goal: dict[str, float], share: float
) -> None:
    source = Adapter.open(odd(tmp_path / "source"))
    resized = resize_adapter(source, ResizeOptions(**goal), tmp_path / "out")
    for name, w in update(tmp_path / "source").items():
        s2 = torch.linalg.svdvals(w).square()
        lost = [(s2[k:].sum() / s2.sum()).item() if s2.sum() else 0.0 for k in range(len(s2) + 1)]
        wanted = max(1, next(k for k, x in enumerate(lost) if x <= share + 1e-12))
        assert resized[name].error == pytest.approx(math.sqrt(lost[resized[name].kept]), abs=1e-6)
        if share:
            assert resized[name].kept == wanted
    assert resized[ZERO].kept == 1


@pytest.mark.parametrize("goal", [{"rank": 2}, {"rank": 16}, {"energy": 0.8}])
def test_padding_gives_all_modules_one_rank_and_the_same_update(tmp_path: Path, goal: dict[str, Any]) -> None:
    source = Adapter.open(odd(tmp_path / "source", torch.bfloat16, use_rslora=True))
    chosen = source.select(["q_proj", "router"])  # the others are padded, too
    resize_adapter(source, ResizeOptions(**goal), tmp_path / "plain", modules=chosen)
    resize_adapter(source, ResizeOptions(**goal, pad=True), tmp_path / "padded", modules=chosen)
    plain, padded = update(tmp_path / "plain"), update(tmp_path / "padded")
    assert all(torch.allclose(plain[name], padded[name], rtol=1e-14, atol=1e-14) for name in plain)
    ranks = {x.r for x in Adapter.open(tmp_path / "padded").modules.values()}
    assert ranks == {max(6, goal.get("rank", 0))}
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values())) <= 1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"o_proj": 4, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"o_proj": 5}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
    ],
    ids=lambda config: "-".join(config) or "plain",
)
@pytest.mark.filterwarnings(IGNORE)
def test_peft_loads_what_was_promised(tmp_path: Path, config: dict[str, Any]) -> None:
    source = Adapter.open(peft_adapter(tmp_path / "source", **config))
    for name, options in (
        ("cut", ResizeOptions(rank=3)),
        ("error", ResizeOptions(error=0.4)),
        ("up", ResizeOptions(rank=9, pad=True)),
    ):
        resize_adapter(source, options, tmp_path / name)
        promised, found = update(tmp_path / name), in_peft(tmp_path / name)
        assert promised.keys() == found.keys()
        for module, w in found.items():
            assert (w.double() - promised[module]).norm() <= 1e-6 * promised[module].norm()
    whole, up = update(tmp_path / "source"), update(tmp_path / "up")
    assert all(torch.allclose(whole[name], up[name], rtol=1e-14, atol=1e-14) for name in whole)
    if config.get("use_dora"):
        old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("source", "cut"))
        magnitudes = [key for key in old if "magnitude" in key]
        assert magnitudes
        assert all(torch.equal(old[key], new[key]) for key in magnitudes)


def test_with_sensitivities_the_directions_that_matter_most_stay(tmp_path: Path) -> None:
    source = Adapter.open(odd(tmp_path / "source", torch.float64))
    measured = sensitivities(source)
    resized = resize_adapter(source, ResizeOptions(rank=2), tmp_path / "out", sensitivity=measured)
    after = update(tmp_path / "out")
    for name, module in source.modules.items():
        x = measured.modules[name]
        best = sorted((x.s * x.g).abs().argsort(descending=True, stable=True)[:2].tolist())
        assert resized[name].directions == best
        u, s, vh = torch.linalg.svd(update(tmp_path / "source")[name], full_matrices=False)
        some = [k for k in best if k < len(s)]
        wanted = (u[:, some] * s[some]) @ vh[some]
        assert (after[name] - wanted).norm() <= 1e-6 * max(1.0, s[0].item()), name
        assert module.r > 2
    assert resized[Q].directions != [0, 1]


def test_a_budget_drops_the_least_over_all_modules_but_leaves_each_one(tmp_path: Path) -> None:
    source = Adapter.open(odd(tmp_path / "source"))
    measured = sensitivities(source)
    worth = {name: (x.s * x.g).abs() for name, x in measured.modules.items()}
    everything = torch.cat(list(worth.values()))
    resized = resize_adapter(source, ResizeOptions(budget=0.3), tmp_path / "share", sensitivity=measured)
    dropped = {
        name: sorted(set(range(len(x))) - set(resized[name].directions or range(len(x)))) for name, x in worth.items()
    }
    lost = sum(worth[name][k].sum() for name, k in dropped.items())
    assert 0.2 * everything.sum() < lost <= 0.3 * everything.sum()
    most_lost = max(float(worth[name][k].max()) for name, k in dropped.items() if k)
    for name, k in dropped.items():
        stays = [i for i in range(len(worth[name])) if i not in k and i != int(worth[name].argmax())]
        assert all(worth[name][i] >= most_lost for i in stays)
    assert resized[ZERO].kept == 1
    costs = {name: module.m + module.n for name, module in source.modules.items()}
    for budget in (sum(costs.values()), 300, 500):
        options = ResizeOptions(budget_params=budget)
        resized = resize_adapter(source, options, tmp_path / str(budget), sensitivity=measured)
        assert budget - max(costs.values()) < sum(x.kept * costs[name] for name, x in resized.items()) <= budget


def test_sensitivities_keep_more_of_what_matters_than_singular_values_do(tmp_path: Path) -> None:
    source = Adapter.open(embedded.adapter_dir())
    measured = sensitivities(source)
    kept = {}
    for name, sensitivity in (("s", None), ("g", measured)):
        resized = resize_adapter(source, ResizeOptions(rank=8), tmp_path / name, sensitivity=sensitivity)
        kept[name] = sum(
            float((x.s * x.g).abs()[resized[module].directions or list(range(8))].sum())
            for module, x in measured.modules.items()
        )
    assert kept["g"] > 1.05 * kept["s"]


def test_what_is_resized_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    adapter = Adapter.open(embedded.adapter_dir())
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            resize_adapter(adapter, ResizeOptions(error=0.2), tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_three_thousand_modules_take_seconds(tmp_path: Path) -> None:
    adapter = Adapter.open(many(tmp_path / "source", layers=10, experts=100))
    assert len(adapter.modules) == 3_000
    began = time.process_time()
    resized = resize_adapter(adapter, ResizeOptions(energy=0.8), tmp_path / "out")
    ranks = {name: x.r for name, x in Adapter.open(tmp_path / "out").modules.items()}
    assert time.process_time() - began < 5  # of all threads; a quarter of that was measured
    assert ranks == {name: x.kept for name, x in resized.items()}
    assert len(set(ranks.values())) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of rank, energy, error, budget and budget_params; got none"),
        ({"rank": 4, "energy": 0.5}, "got rank=4, energy=0.5"),
        ({"energy": 1.5}, "energy must be 0 to 1"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_goals_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResizeOptions(**options)


def test_what_cannot_be_resized_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = Adapter.open(odd(tmp_path / "source"))
    measured = sensitivities(source)
    pissa = Adapter.open(handmade(tmp_path / "pissa", {"init_lora_weights": "pissa"}))
    tensors = load_file(tmp_path / "source" / "adapter_model.safetensors")
    tensors[f"{Q}.lora_B.weight"][0, 0] = float("nan")
    config = json.loads((tmp_path / "source" / "adapter_config.json").read_text())
    broken = Adapter.open(handmade(tmp_path / "broken", config, tensors))
    rank, energy, out = ResizeOptions(rank=2), ResizeOptions(energy=0.5), tmp_path / "out"
    budget, params = ResizeOptions(budget=0.1), ResizeOptions(budget_params=10)
    lacks = Sensitivity({Q: measured.modules[Q]}, measured.record)
    other = Sensitivity(measured.modules, {"adapter_sha256": "0" * 64})
    x = measured.modules[Q]
    moved = Sensitivity({**measured.modules, Q: ModuleSensitivity(1.01 * x.s, x.g)}, measured.record)
    for adapter, options, sensitivity, message in (
        (source, budget, None, "a budget is spent by sensitivities"),
        (source, energy, measured, "energy and error go by singular values alone"),
        (source, params, measured, "less than one direction in every module"),
        (source, rank, lacks, "lack 4 of the selected modules"),
        (source, rank, other, "measured on another adapter"),
        (source, rank, moved, "are not this module's; probe again"),
        (pissa, rank, None, "init_lora_weights=pissa"),
        (broken, rank, None, "layers.0.self_attn.q_proj: B holds a NaN"),
        (broken, energy, None, "layers.0.self_attn.q_proj: B holds a NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            resize_adapter(adapter, options, out, sensitivity=sensitivity)
        assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        resize_adapter(source, rank, out)


def test_the_command_resizes_what_was_probed_and_says_how_much_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Adapter.open(embedded.adapter_dir())
    measured = sensitivities(source)
    some = {name: x for name, x in measured.modules.items() if name.endswith("o_proj")}
    (tmp_path / "probed").mkdir()
    Sensitivity(some, measured.record).save(tmp_path / "probed")
    argv = ["resize", "--lora_path", str(source.path), "--sensitivity", str(tmp_path / "probed"), "--rank", "4"]
    assert main([*argv, "--out_dir", str(tmp_path / "out")]) == 0
    assert "16 modules were not probed, and keep their ranks" in capsys.readouterr().err
    ranks = {name: module.r for name, module in Adapter.open(tmp_path / "out").modules.items()}
    assert ranks == {name: 4 if name in some else module.r for name, module in source.modules.items()}
    assert main([*argv, "--out_dir", str(tmp_path / "all"), "--target_modules", "all-linear"]) == 1
    assert "lack 16 of the selected modules" in capsys.readouterr().err


def test_the_command_resizes_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, out = str(embedded.adapter_dir()), str(tmp_path / "out")
    argv = ["resize", "--lora_path", lora, "--out_dir", out, "--rank", "8", "--target_modules", "o_proj", "q_proj"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["modules"], result["rank_least"], result["rank_most"]) == (8, 8, 8)
    assert result["parameters"] * 4 == result["parameters_before"]
    meta = json.loads((tmp_path / "out" / META).read_text())
    assert meta["meta"]["adapter_sha256"] == Adapter.open(lora).fingerprint()
    assert (meta["meta"]["rank"], meta["meta"]["target_modules"]) == (8, ["o_proj", "q_proj"])
    assert {name: x["error"] for name, x in meta["modules"].items()} == {
        name: x["error"] for name, x in result["resized"].items()
    }
    assert main([*argv, "--overwrite"]) == 0
    assert "8 modules with 8 to 8 directions" in capsys.readouterr().out
    for wrong, message in (([], "got none"), (["--budget", "0.1"], "probe the adapter")):
        with pytest.raises(SystemExit, match="2"):
            main([*argv[:5], *wrong])
        assert message in capsys.readouterr().err

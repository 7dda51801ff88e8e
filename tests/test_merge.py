"""Merging file to file: exact sums, truncation, unions of modules, dtypes, what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import handmade
from merge_tools import (
    layer_adapter,
    merge,
    peft_adapter,
    random_factors,
    relative,
    three_adapters,
    update,
    weighted_sum,
)
from safetensors.torch import load_file
from toolbox_tools import many

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.cli import main
from spectral_fast.toolbox.merging import META, METHODS, MergeOptions, merge_adapters

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float32)}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return three_adapters(tmp_path)


@pytest.mark.parametrize("weights", [[1.0, 0.5, -0.3], [2.0, 2.0, 2.0]])
def test_a_concatenation_is_the_exact_sum_of_adapters_of_any_ranks(
    tmp_path: Path, three: list[Path], weights: list[float]
) -> None:
    merged = merge(three, weights, tmp_path / "out", method="cat")
    wanted, got = weighted_sum(three, weights), update(tmp_path / "out")
    assert got.keys() == wanted.keys()
    assert max(relative(got[name], wanted[name]) for name in got) < EPS[torch.float32]  # one rounding of each entry
    ranks = {name.rpartition(".")[2]: module.r for name, module in merged.items()}
    assert ranks == {"q_proj": 10, "o_proj": 9, "down_proj": 10, "up_proj": 3}


def test_a_concatenation_with_one_scaling_for_all_keeps_every_bit(tmp_path: Path) -> None:
    folders = [handmade(tmp_path / "a"), handmade(tmp_path / "b", {"lora_alpha": 4})]
    merge(folders, [0.3, 0.6], tmp_path / "out", method="cat")
    out = Adapter.open(tmp_path / "out")
    assert {module.scaling for module in out.modules.values()} == {0.3 * 2.0}
    for name, module in out.modules.items():
        for got, dim, k in ((out.read(module)[0], 1, 0), (out.read(module)[1], 0, 1)):
            parts = [x.read(x.modules[name])[k] for x in map(Adapter.open, folders)]
            assert torch.equal(got, torch.cat(parts, dim))


@pytest.mark.parametrize("goal", [{"rank": 3}, {"energy": 0.8}, {"error": 0.3}, {}], ids=str)
def test_the_truncated_sum_is_the_nearest_of_its_rank_and_its_error_is_told(
    tmp_path: Path, three: list[Path], goal: dict[str, Any]
) -> None:
    weights = [1.0, 0.5, -0.3]
    merged = merge(three, weights, tmp_path / "out", method="svd", **goal)
    wanted, got = weighted_sum(three, weights), update(tmp_path / "out")
    for name, module in merged.items():
        s, r = torch.linalg.svdvals(wanted[name]), module.r
        error = float(s[r:].norm() / s.norm())
        # No matrix of rank r is nearer, and but one is as near (Eckart and Young).
        assert relative(got[name], wanted[name]) == pytest.approx(error, abs=64 * EPS[torch.float32])
        assert module.error == pytest.approx(error, abs=64 * EPS[torch.float32])
        if goal == {"rank": 3} or "up_proj" in name:
            assert r == 3
        elif "rank" not in goal:
            bound = goal.get("error", (1 - goal.get("energy", 1.0)) ** 0.5)
            assert r == 6 if not goal else error <= bound < float(s[r - 1 :].norm() / s.norm())


@pytest.mark.parametrize("method", METHODS)
def test_zero_updates_and_ranks_beyond_the_sides_are_merged_like_all_others(tmp_path: Path, method: str) -> None:
    (b, a), (tall_b, tall_a) = random_factors(5, 40, 6, 0), random_factors(40, 5, 6, 1)
    folders = [
        layer_adapter(tmp_path / "a", {"tall": (0 * tall_b, tall_a), "flat": (b, a)}, r=6),
        layer_adapter(tmp_path / "b", {"tall": (tall_b, tall_a), "flat": (0 * b, 0 * a)}, r=6),
        layer_adapter(tmp_path / "c", {"none": (0 * b, a)}, r=6),
    ]
    options: dict[str, Any] = {"density": 1.0} if METHODS[method].sparsify else {}
    merge(folders, [1.0, 1.0, 1.0], tmp_path / "out", method=method, **options)
    got, wanted = update(tmp_path / "out"), weighted_sum(folders, [1.0, 1.0, 1.0])
    assert not got["base_model.model.none"].any()
    if METHODS[method].space != "factors":
        for name in ("base_model.model.tall", "base_model.model.flat"):
            # tsv keeps as many directions of each as all together can have: 5 // 2 of two adapters
            bound = 0.9 if method == "tsv" else 64 * EPS[torch.float32]
            assert relative(got[name], wanted[name]) < bound


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "core_ties"])
def test_dtypes_are_kept_and_the_wider_one_wins(tmp_path: Path, method: str) -> None:
    for name, dtype in (("a", torch.bfloat16), ("b", torch.bfloat16), ("c", torch.float32)):
        peft_adapter(tmp_path / name, ord(name), dtype)
    narrow, mixed = [tmp_path / "a", tmp_path / "b"], [tmp_path / "a", tmp_path / "c"]
    for name, folders, settings, dtype in (
        ("narrow", narrow, {}, torch.bfloat16),
        ("mixed", mixed, {}, torch.float32),
        ("said", narrow, {"dtype": "float32"}, torch.float32),
    ):
        merge(folders, [0.7, 0.2], tmp_path / name, method=method, **settings)
        assert {x.dtype for x in load_file(tmp_path / name / "adapter_model.safetensors").values()} == {dtype}
    if method == "cat":
        wanted = weighted_sum(narrow, [0.7, 0.2])
        for name, dtype in (("narrow", torch.bfloat16), ("said", torch.float32)):
            got = update(tmp_path / name)
            assert max(relative(got[key], wanted[key]) for key in wanted) < EPS[dtype]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_float8_is_merged_if_another_dtype_is_given(tmp_path: Path, method: str) -> None:
    folder = layer_adapter(tmp_path / "a", {"q": random_factors(6, 7, 4, 0, torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"q is stored as torch\.float8_e4m3fn, .*: give dtype bfloat16"):
        merge([folder, folder], [1.0, 2.0], tmp_path / "out", method=method)
    merge([folder, folder], [1.0, 2.0], tmp_path / "out", method=method, dtype="float32", rank=None)
    assert relative(update(tmp_path / "out")["base_model.model.q"], 3 * update(folder)["base_model.model.q"]) < 1e-5


@pytest.mark.parametrize("weights", [[1e-7, 2e-7], [1e5, 2e5]])
def test_what_float16_has_no_room_for_is_refused_and_stored_as_float32(tmp_path: Path, weights: list[float]) -> None:
    folder = layer_adapter(tmp_path / "a", {"q": random_factors(6, 7, 4, 0, torch.float16)})
    with pytest.raises(ValueError, match=r"q: merged factors .* beyond float16 .*: give dtype float32"):
        merge([folder, folder], weights, tmp_path / "out", method="cat")
    merge([folder, folder], weights, tmp_path / "out", method="cat", dtype="float32")
    wanted = weighted_sum([folder, folder], weights)
    assert relative(update(tmp_path / "out")["base_model.model.q"], wanted["base_model.model.q"]) < EPS[torch.float32]


def test_the_alpha_of_mixed_ranks_is_a_whole_number(tmp_path: Path, three: list[Path]) -> None:
    merge(three, [1.0, 0.5, -0.3], tmp_path / "out", method="cat")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert [(type(x), x) for x in (config["r"], config["lora_alpha"])] == [(int, 10), (int, 10)]


def test_convolutions_and_embeddings_are_merged(tmp_path: Path) -> None:
    prefix, folders = "base_model.model.", []
    for i, r in enumerate((4, 2)):
        tensors = {
            f"{prefix}conv.lora_A.weight": torch.randn(r, 3, 5, 5),
            f"{prefix}conv.lora_B.weight": torch.randn(6, r, 1, 1),
            f"{prefix}words.lora_embedding_A": torch.randn(r, 20),
            f"{prefix}words.lora_embedding_B": torch.randn(8, r),
        }
        folders.append(handmade(tmp_path / str(i), {"r": r}, tensors))
    sources = [Adapter.open(x, include_conv=True, include_embedding=True) for x in folders]
    merge_adapters(sources, [1.0, 2.0], MergeOptions(method="cat"), tmp_path / "out")
    wanted, got = weighted_sum(folders, [1.0, 2.0]), update(tmp_path / "out")
    assert max(relative(got[name], wanted[name]) for name in wanted) < EPS[torch.float32]
    shapes = {key: tuple(x.shape) for key, x in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert shapes == {
        f"{prefix}conv.lora_A.weight": (6, 3, 5, 5),
        f"{prefix}conv.lora_B.weight": (6, 6, 1, 1),
        f"{prefix}words.lora_embedding_A": (6, 20),
        f"{prefix}words.lora_embedding_B": (8, 6),
    }


def test_biases_that_one_adapter_has_are_said_by_the_config(tmp_path: Path) -> None:
    plain = load_file(handmade(tmp_path / "plain") / "adapter_model.safetensors")
    bias = {"base_model.model.model.layers.0.self_attn.o_proj.base_layer.bias": torch.ones(10)}
    folders = [tmp_path / "plain", handmade(tmp_path / "bias", {"bias": "lora_only"}, {**plain, **bias})]
    merge(folders, [1.0, 1.0], tmp_path / "out", method="cat")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["bias"] == "lora_only"
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == {*plain, *bias}


def test_tensors_beside_the_factors_come_along_unless_adapters_differ_in_them(tmp_path: Path) -> None:
    folders = []
    for i, head in enumerate((None, torch.ones(3), torch.ones(3), torch.zeros(3))):
        tensors = load_file(handmade(tmp_path / f"plain{i}") / "adapter_model.safetensors")
        if head is not None:
            tensors["base_model.model.score.weight"] = head
        folders.append(handmade(tmp_path / str(i), {"modules_to_save": None if head is None else ["score"]}, tensors))
    for name, chosen in (("one", folders[:2]), ("equal", folders[:3])):
        merge(chosen, [1.0] * len(chosen), tmp_path / name, method="svd")
        written = load_file(tmp_path / name / "adapter_model.safetensors")
        assert torch.equal(written["base_model.model.score.weight"], torch.ones(3))
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    with pytest.raises(ValueError, match=r"score\.weight differs between .*1 and .*3"):
        merge(folders, [1.0] * 4, tmp_path / "bad", method="svd")


def test_keys_that_name_an_adapter_are_written_without_it(tmp_path: Path) -> None:
    plain = load_file(handmade(tmp_path / "plain") / "adapter_model.safetensors")
    tensors = {
        key.replace(".weight", f".{name}.weight"): x.clone() for name in ("one", "two") for key, x in plain.items()
    }
    source = Adapter.open(handmade(tmp_path / "both", tensors=tensors), adapter_name="two")
    merge_adapters([source, Adapter.open(tmp_path / "plain")], [1.0, 1.0], MergeOptions(method="cat"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == plain.keys()


@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        ({"r": 2}, "linear", "takes equal ranks; .* has ranks 4, 2: take svd"),
        ({"use_dora": True}, "svd", "DoRA's magnitudes"),
        ({"init_lora_weights": "pissa"}, "cat", "init_lora_weights=pissa changes the base weights"),
        ({"fan_in_fan_out": True}, "svd", "fan_in_fan_out is None in .* and True in"),
        ({"kasa_config": {}, "use_qalora": True}, "svd", "cannot be merged: .*use_qalora"),
    ],
)
def test_adapters_that_have_no_sum_are_refused(
    tmp_path: Path, config: dict[str, Any], method: str, message: str
) -> None:
    r = config.get("r", 4)
    prefix = "base_model.model.model.layers.0.self_attn.o_proj"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(r, 12), f"{prefix}.lora_B.weight": torch.ones(10, r)}
    if config.get("use_dora"):
        tensors[f"{prefix}.lora_magnitude_vector"] = torch.ones(10)
    folders = [handmade(tmp_path / "a"), handmade(tmp_path / "b", config, tensors)]
    with pytest.raises(ValueError, match=message):
        merge(folders, [1.0, 1.0], tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_shapes_are_refused_and_of_another_base_model_warned_of(tmp_path: Path) -> None:
    folders = [
        layer_adapter(tmp_path / "a", {"q": random_factors(6, 7, 4, 0)}, base_model_name_or_path="one"),
        layer_adapter(tmp_path / "b", {"q": random_factors(6, 8, 4, 0)}, base_model_name_or_path="two"),
        layer_adapter(
            tmp_path / "c", {"q": random_factors(6, 7, 4, 0)}, base_model_name_or_path="two", megatron_core="x"
        ),
    ]
    with pytest.raises(ValueError, match=r"q has lora_B \(6, 4\) and lora_A \(4, 7\) in .*a, \(6, 4\) and \(4, 8\) in"):
        merge(folders[:2], [1.0, 1.0], tmp_path / "out", method="svd")
    told: list[str] = []
    merge([folders[0], folders[2]], [1.0, 1.0], tmp_path / "out", method="svd", warn=told.extend)
    assert told == [
        f"the base model of {folders[0]} is one, and that of {folders[2]} two",
        f"megatron_core differ; the merged adapter has them from {folders[0]}",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ties"}, "give density"),
        ({"method": "ties", "density": 0.0}, "give density"),
        ({"method": "svd", "density": 0.5}, "density is not for svd"),
        ({"method": "cat", "rank": 4}, "rank is not for cat"),
        ({"method": "svd", "rank": 4, "error": 0.1}, "give one of rank, energy and error"),
        ({"method": "mean"}, "method must be one of cat, svd"),
        ({"method": "dare_ties", "density": 1.5}, "density must be 0 to 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeOptions(**settings)


def test_the_agreement_is_the_share_of_entries_that_have_the_elected_sign(tmp_path: Path) -> None:
    folders = [
        layer_adapter(tmp_path / str(i), {"q": (torch.tensor(b)[:, None], torch.ones(1, 2))}, r=1)
        for i, b in enumerate(([1.0, 1.0, 0.0], [2.0, -3.0, 0.0]))
    ]
    [module] = merge(folders, [1.0, 1.0], tmp_path / "out", method="ties", density=1.0).values()
    assert module.agreement == (3 / 4 + 1) / 2  # of B, of which one of four that are not zero differs, and of A


def test_an_adapter_that_shares_no_module_with_the_others_is_warned_of(tmp_path: Path, three: list[Path]) -> None:
    other = layer_adapter(tmp_path / "other", {"transformer.q": random_factors(6, 7, 4, 0)})
    told: list[str] = []
    merge([*three, other], [1.0, 1.0, 1.0, 1.0], tmp_path / "out", method="cat", warn=told.extend)
    [warning] = [text for text in told if "no other adapter" in text]
    assert f"has any module of {other}, such as base_model.model.transformer.q: are they of one" in warning


def test_that_peft_loads_thousands_of_ranks_slowly_is_warned_of(
    tmp_path: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectral_fast.toolbox.merging.merge.MANY", 0)
    told: list[str] = []
    merge(three, [1.0, 1.0, 1.0], tmp_path / "one", method="svd", rank=2, warn=told.extend)
    assert not told
    merge(three, [1.0, 1.0, 1.0], tmp_path / "many", method="svd", error=0.3, warn=told.extend)
    count = len(json.loads((tmp_path / "many" / "adapter_config.json").read_text())["rank_pattern"])
    assert told == [f"PEFT tries each of {count} patterns on every module, for minutes to hours; --rank needs none"]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, 1e30], [1e-31, 1.0]])
def test_weights_that_cannot_be_meant_are_refused(tmp_path: Path, weights: list[float]) -> None:
    folder = handmade(tmp_path / "a")
    with pytest.raises(ValueError, match="weight"):
        merge([folder, folder], weights, tmp_path / "out", method="svd")


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path: Path, method: str) -> None:
    b, a = random_factors(6, 7, 4, 0)
    folders = [
        layer_adapter(tmp_path / "a", {"q": (b, a)}),
        layer_adapter(tmp_path / "b", {"q": (b, a * float("nan"))}),
    ]
    with pytest.raises(ValueError, match=r"model\.q\.lora_A\.weight of .*b has NaN or infinite values"):
        merge(folders, [1.0, 1.0], tmp_path / "out", method=method)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_the_command_merges_and_tells_what_it_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, out = str(embedded.adapter_dir()), tmp_path / "out"
    argv = ["merge", "--lora_path", lora, lora, "--weights", "0.5", "-1.5e0", "--out_dir", str(out)]
    assert main([*argv, "--rank", "8", "--json", "--target_modules", "q_proj"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["modules"]), result["ranks"], result["weights"]) == (4, [8, 8], [0.5, -1.5])
    assert 0 < result["error_mean"] <= result["error_most"] < 1
    meta = json.loads((out / META).read_text())
    assert [source["weight"] for source in meta["meta"]["sources"]] == [0.5, -1.5]
    assert {source["adapter_sha256"] for source in meta["meta"]["sources"]} == {Adapter.open(lora).fingerprint()}
    assert meta["modules"] == result["modules"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    assert main([*argv, "--method", "ties", "--density", "0.5", "--overwrite"]) == 0
    assert "have the sign that was elected" in capsys.readouterr().out
    assert main(argv) == 1
    assert "not empty" in capsys.readouterr().err


def test_the_command_wants_a_weight_for_each_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = str(embedded.adapter_dir())
    with pytest.raises(SystemExit) as exit_:
        main(["merge", "--lora_path", lora, lora, "--weights", "1", "--out_dir", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert "--weights takes one per adapter; got 1 for 2" in capsys.readouterr().err


def test_a_selection_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no module to merge is selected of .*a"):
        merge([handmade(tmp_path / "a")], [1.0], tmp_path / "out", method="svd", modules=[[]])


def test_thousands_of_modules_take_seconds(tmp_path: Path) -> None:
    folder = many(tmp_path / "source", layers=10, experts=100)
    began = time.process_time()
    merged = merge([folder, folder], [0.25, 0.25], tmp_path / "out", method="svd", energy=0.8)
    ranks = {name: module.r for name, module in Adapter.open(tmp_path / "out").modules.items()}
    assert time.process_time() - began < 5  # of all threads, for 3000; 5.3 s were measured for 12,000
    assert ranks == {name: module.r for name, module in merged.items()}
    assert len(set(ranks.values())) > 2


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    folders = [handmade(tmp_path / "a"), handmade(tmp_path / "b")]
    with pytest.raises(ValueError, match="must not contain each other"):
        merge(folders, [1.0, 1.0], tmp_path / "b", method="svd", overwrite=True)

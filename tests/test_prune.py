"""Rank channels of an adapter: scores by definition, zeroed or left out, and what PEFT makes of the copy."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import files, handmade, logits, randomise, save
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_llama

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.cli import main
from spectral_fast.toolbox.measures import channel_energy
from spectral_fast.toolbox.options import PruneOptions
from spectral_fast.toolbox.prune import META, prune_adapter

METHODS = ("channel_energy", "magnitude_B", "random")


def update(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> scaling · B A in float64."""
    adapter = Adapter.open(folder)
    return {
        name: module.scaling * (b.double() @ a.double())
        for name, module in adapter.modules.items()
        for b, a in [adapter.read(module)]
    }


def peft_adapter(folder: Path, **config: Any) -> Path:
    targets = config.pop("target_modules", ["q_proj", "o_proj", "down_proj"])
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), LoraConfig(r=6, lora_alpha=9, target_modules=targets, **config))
    return save(randomise(model), folder)


def loaded(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(tiny_llama(), str(folder)))


def test_channel_energy_is_the_norm_of_the_outer_product() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(7, 3, generator=generator).bfloat16(), torch.randn(3, 5, generator=generator).bfloat16()
    outer = [(b[:, [k]].double() @ a[[k]].double()).square().sum() for k in range(3)]
    torch.testing.assert_close(channel_energy(b, a), torch.stack(outer), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("ratio", "r", "keep"), [(0.5, 8, 4), (0.5, 5, 3), (0.0, 8, 1), (1.0, 8, 8), (0.1, 30, math.ceil(0.1 * 30))]
)
def test_the_share_is_rounded_up_and_one_channel_always_stays(ratio: float, r: int, keep: int) -> None:
    options = PruneOptions(keep_ratio=ratio)
    assert options.keep(r) == keep
    assert int(options.kept(torch.rand(r)).sum()) == keep


@pytest.mark.parametrize("method", METHODS)
def test_the_channels_of_the_highest_scores_stay_and_the_others_are_zero(tmp_path: Path, method: str) -> None:
    source = Adapter.open(handmade(tmp_path / "source"))
    pruned = prune_adapter(source, PruneOptions(method=method, keep_ratio=0.5, seed=4), tmp_path / "out")
    draw = random.Random(4).random
    copy = Adapter.open(tmp_path / "out")
    for name, module in source.modules.items():
        (b, a), (b_new, a_new) = source.read(module), copy.read(copy.modules[name])
        score = {
            "channel_energy": (b.double() ** 2).sum(0) * (a.double() ** 2).sum(1),
            "magnitude_B": (b.double() ** 2).sum(0),
            "random": torch.tensor([draw() for _ in range(4)]),
        }[method]
        kept = pruned[name].kept
        assert int(kept.sum()) == 2
        assert score[kept].min() > score[~kept].max()
        assert torch.equal(b_new[:, kept], b[:, kept])
        assert torch.equal(a_new[kept], a[kept])
        assert not b_new[:, ~kept].any()
        assert not a_new[~kept].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_compact_copy_is_the_same_update_with_a_smaller_rank(tmp_path: Path, method: str) -> None:
    source = Adapter.open(handmade(tmp_path / "source"))
    options = PruneOptions(method=method, keep_ratio=0.75)
    prune_adapter(source, options, tmp_path / "zeroed")
    prune_adapter(source, options, tmp_path / "compact", compact=True)
    zeroed, compact = update(tmp_path / "zeroed"), update(tmp_path / "compact")
    assert all(torch.allclose(zeroed[name], compact[name], rtol=1e-14, atol=1e-14) for name in zeroed)
    config = json.loads((tmp_path / "compact" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 6, {})
    shapes = {tuple(tensor.shape) for tensor in load_file(tmp_path / "compact" / "adapter_model.safetensors").values()}
    assert shapes == {(10, 3), (3, 12), (3, 14)}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"o_proj": 4, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"o_proj": 5}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
        {"lora_bias": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda config: "-".join(config) or "plain",
)
@pytest.mark.parametrize("some", [False, True], ids=["all modules", "some modules"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:.*`lora_bias=True` was passed:UserWarning")
@pytest.mark.filterwarnings("ignore:.*`save_embedding_layers`:UserWarning")
def test_peft_computes_the_same_with_zeroed_channels_and_without_them(
    tmp_path: Path, config: dict[str, Any], some: bool
) -> None:
    source = Adapter.open(peft_adapter(tmp_path / "source", **config))
    modules = source.select(("q_proj",)) if some else None
    for name in ("zeroed", "compact"):
        compact = name == "compact"
        prune_adapter(source, PruneOptions(keep_ratio=0.5), tmp_path / name, modules=modules, compact=compact)
    zeroed, compact = loaded(tmp_path / "zeroed"), loaded(tmp_path / "compact")
    torch.testing.assert_close(compact, zeroed, rtol=0, atol=1e-5)
    assert (zeroed - loaded(tmp_path / "source")).abs().max() > 1e-3
    opened = Adapter.open(tmp_path / "compact")
    changed = {name for name, module in opened.modules.items() if module.r != source.modules[name].r}
    assert changed == {module.name for module in modules or source.modules.values()}
    for name, module in opened.modules.items():
        assert module.scaling == pytest.approx(source.modules[name].scaling, rel=1e-12)


def test_convolutions_and_embeddings_are_pruned_on_request(tmp_path: Path) -> None:
    prefix = "base_model.model."
    tensors = {
        f"{prefix}conv.lora_A.weight": torch.randn(4, 3, 5, 5),
        f"{prefix}conv.lora_B.weight": torch.randn(6, 4, 1, 1),
        f"{prefix}words.lora_embedding_A": torch.randn(4, 20),
        f"{prefix}words.lora_embedding_B": torch.randn(8, 4),
    }
    folder = handmade(tmp_path / "source", tensors=tensors)
    adapter = Adapter.open(folder, include_conv=True, include_embedding=True)
    prune_adapter(adapter, PruneOptions(keep_ratio=0.25), tmp_path / "out", compact=True)
    shapes = {key.split(".")[2]: set() for key in tensors}
    for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        shapes[key.split(".")[2]].add(tuple(tensor.shape))
    assert shapes == {"conv": {(1, 3, 5, 5), (6, 1, 1, 1)}, "words": {(1, 20), (8, 1)}}


def test_a_pickled_adapter_is_made_compact_too(tmp_path: Path) -> None:
    folder = handmade(tmp_path / "source")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    prune_adapter(Adapter.open(folder), PruneOptions(), tmp_path / "out", compact=True)
    prune_adapter(Adapter.open(folder), PruneOptions(), tmp_path / "zeroed")
    compact, zeroed = update(tmp_path / "out"), update(tmp_path / "zeroed")
    assert all(torch.allclose(compact[name], zeroed[name], rtol=1e-14, atol=1e-14) for name in zeroed)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_the_rank_of_an_adapter_that_changes_the_base_by_it_stays(tmp_path: Path, init: str) -> None:
    adapter = Adapter.open(handmade(tmp_path / "source", {"init_lora_weights": init}))
    with pytest.raises(ValueError, match=f"init_lora_weights={init}.*zero the channels instead"):
        prune_adapter(adapter, PruneOptions(), tmp_path / "out", compact=True)
    assert not (tmp_path / "out").exists()
    prune_adapter(adapter, PruneOptions(), tmp_path / "out")


def test_the_rank_of_one_of_several_adapters_in_a_file_stays(tmp_path: Path) -> None:
    plain = load_file(handmade(tmp_path / "plain") / "adapter_model.safetensors")
    tensors = {
        key.replace(".weight", f".{name}.weight"): value.clone()
        for name in ("one", "two")
        for key, value in plain.items()
    }
    adapter = Adapter.open(handmade(tmp_path / "both", tensors=tensors), adapter_name="one")
    with pytest.raises(ValueError, match="holds several adapters"):
        prune_adapter(adapter, PruneOptions(), tmp_path / "out", compact=True)
    prune_adapter(adapter, PruneOptions(), tmp_path / "out")
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(new[key], tensors[key]) for key in tensors if ".two." in key)


def test_peft_loads_the_compact_copy_of_an_orthogonal_init_whose_ranks_are_odd(tmp_path: Path) -> None:
    source = Adapter.open(peft_adapter(tmp_path / "source", init_lora_weights="orthogonal"))
    prune_adapter(source, PruneOptions(keep_ratio=0.5), tmp_path / "out", compact=True)
    prune_adapter(source, PruneOptions(keep_ratio=0.5), tmp_path / "zeroed")
    torch.testing.assert_close(loaded(tmp_path / "out"), loaded(tmp_path / "zeroed"), rtol=0, atol=1e-5)


def test_peft_saves_a_compact_copy_again_so_that_it_loads(tmp_path: Path) -> None:
    pattern = {"layers.1.self_attn.o_proj": 4}  # which PEFT, sorting, puts before the whole names
    source = Adapter.open(peft_adapter(tmp_path / "source", rank_pattern=pattern))
    prune_adapter(source, PruneOptions(keep_ratio=0.5), tmp_path / "out", compact=True)
    save(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")), tmp_path / "again")
    assert torch.equal(loaded(tmp_path / "again"), loaded(tmp_path / "out"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite_is_refused_even_if_it_is_to_go(tmp_path: Path, bad: float) -> None:
    tensors = load_file(handmade(tmp_path / "plain") / "adapter_model.safetensors")
    key = next(key for key in tensors if "layers.1.mlp.down_proj.lora_A" in key)
    tensors[key][:, 0] = bad
    adapter = Adapter.open(handmade(tmp_path / "source", tensors=tensors))
    for method in METHODS:
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.lora_B\.weight or its lora_A has NaN"):
            prune_adapter(adapter, PruneOptions(method=method, keep_ratio=0.25), tmp_path / "out", compact=True)
    assert not (tmp_path / "out").exists()


def test_a_channel_that_is_not_finite_is_refused_with_its_name(tmp_path: Path) -> None:
    tensors = load_file(handmade(tmp_path / "plain") / "adapter_model.safetensors")
    key = next(key for key in tensors if "layers.1.mlp.down_proj.lora_B" in key)
    tensors[key][0, 2] = float("nan")
    adapter = Adapter.open(handmade(tmp_path / "source", tensors=tensors))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.lora_B\.weight or its lora_A has NaN"):
        prune_adapter(adapter, PruneOptions(keep_ratio=0.25), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pruning_by_sensitivity_is_an_edit_whose_zero_directions_are_then_left_out(tmp_path: Path) -> None:
    base, lora = ["--base_model", str(embedded.base_model_dir())], ["--lora_path", str(embedded.adapter_dir())]
    data = ["--calib_data", str(embedded.calibration_file()), "--calib_samples", "4"]
    rule = ["--sup_factor", "0", "--amp_factor", "1", "--noise_frac", "0.5", "--preserve_energy", "none"]
    edited, compact = tmp_path / "edited", tmp_path / "compact"
    assert main(["edit", *base, *lora, *data, *rule, "--out_dir", str(edited)]) == 0
    argv = ["--lora_path", str(edited), "--out_dir", str(compact), "--target_modules", "o_proj", "down_proj"]
    assert main(["prune", *argv, "--keep_ratio", "0.5", "--compact"]) == 0
    before, after = update(edited), update(compact)
    assert all(torch.allclose(before[name], after[name], rtol=1e-12, atol=1e-14) for name in before)
    ranks = {name: module.r for name, module in Adapter.open(compact).modules.items()}
    assert {r for name, r in ranks.items() if "o_proj" in name or "down_proj" in name} == {16}
    assert {r for name, r in ranks.items() if "q_proj" in name} == {32}


def test_the_command_prunes_all_modules_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ["--lora_path", str(embedded.adapter_dir())]
    argv = ["prune", *lora, "--out_dir", str(tmp_path / "out"), "--method", "random", "--seed", "3", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["modules"], result["channels"], result["kept"]) == (20, 640, 320)
    meta = json.loads((tmp_path / "out" / META).read_text())
    assert {key: meta["meta"][key] for key in ("method", "keep_ratio", "seed", "compact", "lora_path")} == {
        "method": "random",
        "keep_ratio": 0.5,
        "seed": 3,
        "compact": False,
        "lora_path": lora[1],
    }
    assert meta["meta"]["adapter_sha256"] == Adapter.open(lora[1]).fingerprint()
    assert all(len(module["kept"]) == 16 for module in meta["modules"].values())
    energies = [module["energy_kept"] for module in meta["modules"].values()]
    assert result["energy_kept"] == pytest.approx(sum(energies) / 20)


def test_what_is_pruned_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    adapter = Adapter.open(embedded.adapter_dir())
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            prune_adapter(adapter, PruneOptions(method="random", seed=1), tmp_path / str(threads), compact=True)
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "1") == files(tmp_path / "3")


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--keep_ratio", "1.5"], 2, "--keep_ratio: must be 0 to 1; got 1.5"),
        (["--target_modules", "gate_proj"], 1, "the adapter has"),
        (["--method", "svd"], 2, "invalid choice: 'svd'"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], status: int, message: str
) -> None:
    argv = ["prune", "--lora_path", str(embedded.adapter_dir()), "--out_dir", str(tmp_path / "out"), *argv]
    try:
        got = main(argv)
    except SystemExit as exit_:
        got = int(exit_.code or 0)
    assert got == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

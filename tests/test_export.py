"""Adapters for loaders with one rank and one scaling, and adapters whose spikes are clipped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import handmade
from safetensors.torch import load_file
from toolbox_tools import IGNORE, PREFIX, in_peft, many, odd, peft_adapter, update

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.cli import main
from spectral_fast.toolbox import clip, export
from spectral_fast.toolbox.clip import ClipOptions, clip_adapter
from spectral_fast.toolbox.export import export_adapter

HALF = 0.5 * torch.finfo(torch.bfloat16).eps


def plain_loader(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> ΔW to a loader that knows r and lora_alpha alone, float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        name: config["lora_alpha"] / config["r"] * tensors[f"{name}.lora_B.weight"].double() @ a
        for name in names
        for a in [tensors[f"{name}.lora_A.weight"].double()]
        if a.shape[0] == config["r"]
    }


def distances(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    assert one.keys() == other.keys()
    return {name: float((w - other[name]).norm() / (w.norm() or 1.0)) for name, w in one.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_a_loader_without_patterns_comes_to_the_same_update(tmp_path: Path, dtype: torch.dtype, rslora: bool) -> None:
    adapter = Adapter.open(odd(tmp_path / "source", dtype, use_rslora=rslora))
    baked = export_adapter(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    found = distances(update(tmp_path / "source"), plain_loader(tmp_path / "out"))
    for name, x in baked.items():
        exact = math.frexp(adapter.modules[name].scaling)[0] == 0.5
        assert x.error == 0 if exact else 0 <= x.error <= 4 * torch.finfo(dtype).eps
        assert found[name] == pytest.approx(x.error, rel=1e-6, abs=1e-14)
        b, a = (y.double() for y in adapter.read(adapter.modules[name]))
        in_b, in_a = (((y * x.scaling).to(dtype).double(), other) for y, other in ((b, a), (a, b)))
        w = x.scaling * b @ a
        either = [float((y @ z - w).norm() / (w.norm() or 1.0)) for y, z in (in_b, in_a[::-1])]
        assert x.error == pytest.approx(min(either), rel=1e-6, abs=1e-14)  # of the factor whose rounding errs less
    assert {x.error > 0 for x in baked.values()} == {False, True}  # scalings 1 and 2, or others


def test_a_power_of_two_that_leaves_the_range_of_b_goes_into_a(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}.0.mlp.down_proj.lora_A.weight": torch.full((4, 6), 0.5).half(),
        f"{PREFIX}.0.mlp.down_proj.lora_B.weight": torch.full((5, 4), 60000.0).half(),
    }
    adapter = Adapter.open(handmade(tmp_path / "source", {"lora_alpha": 16}, tensors))
    [x] = export_adapter(adapter, tmp_path / "out").values()
    assert (x.factor, x.scaling, x.error) == ("A", 4.0, 0.0)
    assert distances(update(tmp_path / "source"), plain_loader(tmp_path / "out")) == dict.fromkeys(adapter.modules, 0.0)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
        {"use_dora": True, "alpha_pattern": {"o_proj": 5}},
        {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 3}},
    ],
    ids=["rslora", "dora", "embedding"],
)
@pytest.mark.filterwarnings(IGNORE)
def test_peft_loads_the_exported_adapter_with_the_same_update(tmp_path: Path, config: dict[str, Any]) -> None:
    source = peft_adapter(tmp_path / "source", **config)
    assert main(["export", "--bake_scaling", "--lora_path", str(source), "--out_dir", str(tmp_path / "out")]) == 0
    before, after = in_peft(source), in_peft(tmp_path / "out")
    assert all(torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-6) for name in before)
    assert {x.scaling for x in Adapter.open(tmp_path / "out").modules.values()} == {1.0}
    meta = json.loads((tmp_path / "out" / export.META).read_text())
    assert meta["meta"]["adapter_sha256"] == Adapter.open(source).fingerprint()


def test_what_cannot_be_exported_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(handmade(tmp_path / "plain") / "adapter_model.safetensors")
    bias = {f"{PREFIX}.0.mlp.down_proj.lora_B.bias": torch.ones(10)}
    lone = {f"{PREFIX}.9.mlp.down_proj.lora_A.weight": torch.ones(4, 9)}
    for name, config, more, message in (
        ("pissa", {"init_lora_weights": "pissa"}, {}, "init_lora_weights=pissa"),
        ("bias", {}, bias, "lora_B.bias is scaled by 2 with its module"),
        ("half", {}, lone, "lora_B is missing"),
        ("variant", {"use_bdlora": {"nblocks": 2}}, {}, "block-diagonal"),
    ):
        adapter = Adapter.open(handmade(tmp_path / name, config, tensors | more))
        with pytest.raises(ValueError, match=message):
            export_adapter(adapter, tmp_path / "out")
    empty = Adapter.open(handmade(tmp_path / "empty", {}, {}))
    with pytest.raises(ValueError, match="has no LoRA factors"):
        export_adapter(empty, tmp_path / "out")
    with pytest.raises(ValueError, match=r"init_lora_weights=pissa: .* so their spikes are the base's"):
        clip_adapter(Adapter.open(tmp_path / "pissa"), ClipOptions(), tmp_path / "out")
    adapter = Adapter.open(tmp_path / "plain")
    with pytest.raises(ValueError, match="at least the largest there is, 4; got 3"):
        export_adapter(adapter, tmp_path / "out", rank=3)
    assert not (tmp_path / "out").exists()
    export_adapter(adapter, tmp_path / "out", rank=16)
    assert {x.r for x in Adapter.open(tmp_path / "out").modules.values()} == {16}
    with pytest.raises(SystemExit, match="2"):
        main(["export", "--lora_path", str(tmp_path / "plain"), "--out_dir", str(tmp_path / "other")])
    assert "--bake_scaling" in capsys.readouterr().err


def test_clipped_spectra_end_at_the_multiple_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    adapter = Adapter.open(odd(tmp_path / "source"))
    clipped = clip_adapter(adapter, ClipOptions(multiple=1.2), tmp_path / "out")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("source", "out"))
    after = update(tmp_path / "out")
    for name, w in update(tmp_path / "source").items():
        module = adapter.modules[name]
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        s = s / module.scaling
        limit = 1.2 * s[s > 1e-5 * s[0]].median().item() if s[0] else math.inf
        if s[0]:  # torch's median is the lower one of two
            values = s[s > 1e-5 * s[0]]
            limit = 1.2 * values.quantile(0.5).item()
        assert clipped[name].clipped == pytest.approx(s[s > limit].tolist(), rel=1e-5)
        wanted = module.scaling * (u * s.clamp(max=limit)) @ vh
        assert (after[name] - wanted).norm() <= 1e-4 * (w.norm() or 1.0)
        if len(clipped[name].clipped):
            assert clipped[name].error == pytest.approx(float((w - wanted).norm() / w.norm()), rel=1e-4)
        else:
            assert torch.equal(old[module.b_key], new[module.b_key])
            assert torch.equal(old[module.a_key], new[module.a_key])
    assert {bool(x.clipped) for x in clipped.values()} == {False, True}
    again = clip_adapter(Adapter.open(tmp_path / "out"), ClipOptions(multiple=50), tmp_path / "again")
    assert not any(x.clipped for x in again.values())


def test_the_command_clips_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["clip", "--lora_path", str(embedded.adapter_dir()), "--out_dir", str(tmp_path / "out"), "--multiple", "20"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["modules"] == 20
    assert 0 < result["modules_clipped"] < 20
    meta = json.loads((tmp_path / "out" / clip.META).read_text())
    assert meta["modules"] == result["clipped"]
    assert meta["meta"]["multiple"] == 20
    with pytest.raises(SystemExit):
        main([*argv, "--overwrite", "--multiple", "0.5"])
    assert "--multiple: must be at least 1" in capsys.readouterr().err


def test_thousands_of_modules_are_exported_and_clipped(tmp_path: Path) -> None:
    adapter = Adapter.open(many(tmp_path / "source", layers=4, experts=100))
    clipped = clip_adapter(adapter, ClipOptions(multiple=1.5), tmp_path / "clipped")
    baked = export_adapter(Adapter.open(tmp_path / "clipped"), tmp_path / "plain", rank=16)
    assert len(clipped) == len(baked) == 1200
    assert max(distances(update(tmp_path / "clipped"), update(tmp_path / "plain")).values()) == 0

"""LS-LoRA in PEFT: what it computes, that PEFT saves, loads and switches it, that nothing takes it for plain LoRA."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lslora_tools import IDS, LAYER, TARGETS, logits, randomise, splined
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tiny_models import Convolutional, tiny_llama, with_lora

from spectral_fast import Adapter, calibrate, embedded, sensitivity_from_gradients
from spectral_fast.cli import main
from spectral_fast.evaluation.engines.vllm import served_rank
from spectral_fast.lslora import (
    LSLoraConfig,
    LSLoraModel,
    SplineLayer,
    read_splines,
    spline_parameters,
    spline_penalty,
    splines_of,
)
from spectral_fast.lslora.config import _EXCLUDED
from spectral_fast.splines import INPUT_SCALE, OUTPUT_SCALE, PARAMETERS, VALUES


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = splined()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {"down_proj": 5}}]
)
def test_without_clamp_it_starts_as_lora_to_rounding(more: dict[str, Any]) -> None:
    found = {}
    for config in (LoraConfig, LSLoraConfig):
        torch.manual_seed(3)
        options = {"clamp": False} if config is LSLoraConfig else {}
        model = get_peft_model(tiny_llama(), config(r=4, lora_alpha=8, target_modules=TARGETS, **more, **options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # so large that LoRA's output leaves the knots
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
        found[config] = (out.logits, gradients)
    (wanted, wanted_gradients), (got, gradients) = found.values()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"num_knots": 8, "k_min": -1, "k_max": 2.0}, {"extrapolate": True}])
def test_a_layer_is_the_formula(options: dict[str, Any]) -> None:
    model = splined(**options)
    layer = model.get_submodule(LAYER)
    x = torch.randn(5, layer.in_features)
    spline = layer.spline("default")
    a, b = (getattr(layer, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
    z = 12 / 6 * (x.numpy() @ a.T @ b.T)
    k = np.linspace(spline.options.k_min, spline.options.k_max, spline.options.num_knots)
    v = spline.values.numpy()
    s = spline.input_scale * z.clip(k[0], k[-1])
    phi = np.interp(s, k, v)
    if options.get("extrapolate"):
        dk = k[1] - k[0]
        phi += np.where(s < k[0], (v[1] - v[0]) / dk * (s - k[0]), 0)
        phi += np.where(s > k[-1], (v[-1] - v[-2]) / dk * (s - k[-1]), 0)
    wanted = layer.base_layer(x).detach().numpy() + spline.output_scale * phi
    np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_what_is_clamped_moves_no_factor() -> None:
    layer = splined().get_submodule(LAYER)
    layer.lora_B["default"].weight.data.fill_(100.0)
    x = torch.ones(1, layer.in_features)
    end = 3.0 * layer.lora_A["default"](x).sum().sign().detach()  # of all outputs alike
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(out, layer.base_layer(x) + layer.spline("default")(end.view(1)))
    assert not layer.lora_A["default"].weight.grad.any()
    assert not layer.lora_B["default"].weight.grad.any()


def test_dropout_is_before_the_factors() -> None:
    layer = splined(lora_dropout=0.5).get_submodule(LAYER).train()
    x = torch.randn(5, layer.in_features)
    torch.manual_seed(7)
    got = layer(x)
    torch.manual_seed(7)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(got - layer.base_layer(x), layer.eval()(kept) - layer.base_layer(kept))


def test_it_is_saved_and_loaded_as_it_is(saved: Path) -> None:
    wanted = logits(splined())
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_knots"], config["k_min"]) == ("LSLORA", 5, -3.0)
    tensors = load_file(saved / "adapter_model.safetensors")
    assert len(tensors) == 9 * 5
    assert {tuple(tensors[f"{LAYER}.{name}"].shape) for name in (INPUT_SCALE, OUTPUT_SCALE)} == {(1,)}
    assert tensors[f"{LAYER}.{VALUES}"].shape == (5,)
    for how in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tiny_llama(), str(saved), **how)
        assert isinstance(loaded.peft_config["default"], LSLoraConfig)
        assert torch.equal(logits(loaded), wanted)
    inside = tiny_llama()
    inside.load_adapter(str(saved))  # transformers' own way
    assert torch.equal(logits(inside), wanted)


def test_adapters_are_switched_combined_disabled_mixed_and_deleted(saved: Path) -> None:
    model = splined()
    first = logits(model)
    model.add_adapter("other", LSLoraConfig(r=3, target_modules=["q_proj"], num_knots=7, clamp=False))
    randomise(model, 9, "other")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-3)
    mixed = logits(model, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert not torch.allclose(both, first, atol=1e-3)
    assert not torch.allclose(both, second, atol=1e-3)
    model.load_adapter(str(saved), "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    assert torch.equal(logits(model), first)
    layer = model.get_submodule(LAYER)
    assert all("default" not in getattr(layer, name) for name in (*PARAMETERS, "spline_options"))
    assert torch.equal(logits(model.unload()), logits(tiny_llama()))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        splined().add_adapter("plain", LoraConfig(target_modules=["q_proj"]))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_neither_kind_is_put_into_the_layers_of_the_other() -> None:
    plain, spline = (config(target_modules=["q_proj"]) for config in (LoraConfig, LSLoraConfig))
    for first, second, complaint in (
        (plain, spline, "has plain LoRA where the LS-LoRA 'second' shall be"),
        (spline, plain, "has LS-LoRA where the plain LoRA 'second' shall be"),
    ):
        model = tiny_llama()
        model.add_adapter(first, "first")  # transformers' own way, which does not look at the kinds
        with pytest.raises(ValueError, match=complaint):
            model.add_adapter(second, "second")


def test_without_a_name_the_active_adapter_is_meant() -> None:
    model = splined(spline_reg_weight=1.0)
    model.add_adapter("other", LSLoraConfig(target_modules=["q_proj"], num_knots=7, spline_reg_weight=2.0))
    randomise(model, 9, "other")
    for name, layers in (("default", 9), ("other", 3)):
        model.set_adapter(name)
        assert len(splines_of(model)) == layers
        assert sum(p.requires_grad for p in spline_parameters(model)) == 3 * layers
        assert spline_penalty(model).requires_grad
        assert torch.equal(spline_penalty(model), spline_penalty(model, name))
        off = [spline.values - spline.options.grid() for spline in splines_of(model, name).values()]
        wanted = torch.stack(off).square().mean().item()
        assert spline_penalty(model).item() == pytest.approx((1 if name == "default" else 2) * wanted, rel=1e-5)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="several LS-LoRA adapters are active, default, other: say which"):
        spline_penalty(model)
    assert len(splines_of(model, "other")) == 3


def test_merging_and_converting_are_refused(saved: Path) -> None:
    model = splined()
    layer = model.get_submodule(LAYER)
    merges = [model.merge_and_unload, model.merge_adapter, layer.merge, lambda: layer.get_delta_weight("default")]
    for merge in merges:
        with pytest.raises(ValueError, match="LS-LoRA cannot be merged"):
            merge()
    with pytest.raises(ValueError, match="cannot be combined into one"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    with pytest.raises(ValueError, match="is for plain LoRA"):
        model.save_pretrained(saved.with_name("converted"), path_initial_model_for_weight_conversion=str(saved))


def test_peft_without_this_package_refuses_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "LSLORA")
    for load in (PeftConfig.from_pretrained, LoraConfig.from_pretrained, tiny_llama().load_adapter):
        with pytest.raises(KeyError, match="LSLORA"):
            load(str(saved))
    with pytest.raises(KeyError, match="LSLORA"):
        PeftModel.from_pretrained(tiny_llama(), str(saved))


def test_nothing_here_takes_it_for_plain_lora(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "describes an LS-LoRA: after B A comes a learned spline"
    with pytest.raises(ValueError, match=words):
        Adapter.open(saved)
    with pytest.raises(ValueError, match=rf"{words}.*eval --engine transformers"):
        served_rank([saved], None)
    adapter, plain = str(saved), str(embedded.adapter_dir())
    base = ["--base_model", str(embedded.base_model_dir())]
    for command in (
        ["inspect", "--lora_path", adapter],
        ["diff", plain, adapter],
        ["diff", adapter, plain],
        ["lm-eval", "--lora_dir", adapter, *base],
    ):
        assert main(command) != 0
        assert words in capsys.readouterr().err
    for command in (
        ["prune", "--lora_path", adapter, "--keep_ratio", "0.5"],
        ["resize", "--lora_path", adapter, "--rank", "2"],
        ["clip", "--lora_path", adapter],
        ["export", "--lora_path", adapter, "--bake_scaling"],
        ["merge", "--lora_path", plain, adapter, "--weights", "1", "1"],
        ["probe", "--lora_path", adapter, *base],
        ["edit", "--lora_path", adapter, *base],
        ["edit", "--lora_path", adapter, "--mode", "random_index"],
    ):
        assert main([*command, "--out_dir", str(tmp_path / "out")]) != 0
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    for splines in (False, True):
        with pytest.raises(ValueError, match="should say peft_type LSLORA and not LORA"):
            Adapter.open(saved, splines=splines)


def test_a_model_in_memory_is_not_measured_either() -> None:
    model = splined()
    with pytest.raises(ValueError, match="variant SplineVariant has no spectral form"):
        calibrate(model, "default", [{"input_ids": IDS[:1], "labels": IDS[:1]}])
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="variant SplineVariant is not a function of B A"):
        sensitivity_from_gradients(model)


def test_an_adapter_without_its_splines_is_refused(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({key: value for key, value in whole.items() if key != f"{LAYER}.{OUTPUT_SCALE}"}, file)
    with pytest.raises(ValueError, match=rf"it has {LAYER}.lora_A.weight and no {LAYER}.{OUTPUT_SCALE}"):
        PeftModel.from_pretrained(tiny_llama(), str(saved))
    with_lora(tiny_llama()).save_pretrained(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LSLORA"}))
    with pytest.raises(ValueError, match="damaged, or none of LS-LoRA"):
        PeftModel.from_pretrained(tiny_llama(), str(saved))
    with pytest.raises(ValueError, match=rf"should have \S+{VALUES} of shape \(5,\), got nothing"):
        read_splines(saved)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        *(({name: True}, f"{name} cannot be combined with a spline") for name in ("use_dora", "lora_bias")),
        ({"target_parameters": ["x"]}, "target_parameters cannot be combined"),
        ({"init_lora_weights": "pissa"}, "must be true, false or gaussian with a spline; got 'pissa'"),
        ({"num_knots": 1}, "num_knots must be 2 to 256; got 1"),
        ({"k_min": 3.0}, "k_min must be below k_max; got 3 and 3"),
        ({"interpolation_method": "cubic"}, "must be one of piecewise, soft; got 'cubic'"),
        ({"interpolation_method": "soft", "extrapolate": True}, "leave out extrapolate"),
        ({"spline_tanh": True, "clamp": False}, "clamp must stay"),
        ({"num_knots": 2, "spline_regularizer": "curvature"}, "two knots have no curvature"),
        ({"spline_reg_weight": float("nan")}, "spline_reg_weight must be finite"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LSLoraConfig(target_modules=TARGETS, **given)


def test_all_variants_that_peft_knows_are_excluded() -> None:
    from dataclasses import fields

    variants = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert len(variants) >= 5
    assert variants <= set(_EXCLUDED)


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.embed_tokens is of class Embedding: leave it out"):
        get_peft_model(tiny_llama(), LSLoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="first is of class Conv2d"):
        get_peft_model(Convolutional(), LSLoraConfig(target_modules=["first", "fc"]))


def test_modules_to_save_go_with_it(tmp_path: Path) -> None:
    model = splined(modules_to_save=["lm_head"])
    model.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight.data += 1
    wanted = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about the size of the vocabulary
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path))), wanted)


@pytest.mark.parametrize("method", ["piecewise", "soft"])
def test_every_parameter_has_the_gradient_of_its_differences(method: str) -> None:
    model = splined(interpolation_method=method).double()
    layer = model.get_submodule(LAYER)
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    weights = torch.randn(3, layer.out_features, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for parameter in (*parameters, *(getattr(layer, name)["default"] for name in PARAMETERS)):
        flat, i, step = parameter.data.view(-1), parameter.numel() // 2, 1e-6
        sides = []
        for sign in (1, -1):
            kept = flat[i].item()
            flat[i] += sign * step
            sides.append((layer(x) * weights).sum().item())
            flat[i] = kept
        assert parameter.grad.view(-1)[i].item() == pytest.approx(
            (sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-6
        )


def test_half_precision_leaves_the_splines_in_float32() -> None:
    model = splined(model=tiny_llama(dtype=torch.bfloat16), num_knots=10)
    fresh = get_peft_model(tiny_llama(dtype=torch.bfloat16), LSLoraConfig(target_modules=TARGETS, num_knots=10))
    assert {p.dtype for p in spline_parameters(model)} == {torch.float32}
    assert splines_of(fresh)[LAYER].deviation == 0  # bfloat16 has no 1/3
    try:
        torch.set_default_dtype(torch.bfloat16)
        fresh = get_peft_model(tiny_llama(), LSLoraConfig(target_modules=TARGETS, num_knots=10))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in spline_parameters(fresh)} == {torch.float32}
    assert splines_of(fresh)[LAYER].deviation == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    (out.loss + spline_penalty(model)).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in spline_parameters(model))
    wanted = logits(splined(num_knots=10))
    assert (logits(model).float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointed in (False, True):
        model = splined()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_parameters_are_counted_as_they_are() -> None:
    plain, model = with_lora(tiny_llama()), splined()
    assert isinstance(model.base_model, LSLoraModel)
    layers = [module for module in model.modules() if isinstance(module, SplineLayer)]
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (plain, model)]
    assert len(layers) == 9
    assert trained[1] - trained[0] == sum(p.numel() for p in spline_parameters(model)) == 9 * (5 + 2)

"""Learned splines: presets, penalty, facts and picture."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lslora_tools import LAYER, TARGETS, splined
from peft import get_peft_model
from tiny_models import randomise_b, tiny_llama, with_lora

from spectral_fast.lslora import (
    PRESETS,
    LSLoraConfig,
    SplineLayer,
    SplineOptions,
    read_splines,
    spline_penalty,
    splines_of,
)
from spectral_fast.splines import VALUES


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = splined()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_first_version_has_tanh_a_sine_and_a_small_output() -> None:
    model = get_peft_model(tiny_llama(), LSLoraConfig.preset("V0", r=4, target_modules=TARGETS, lora_alpha=8))
    randomise_b(model)
    layer = model.get_submodule(LAYER)
    x = torch.randn(5, layer.in_features)
    grid = torch.linspace(-1, 1, 5)
    z = 2 * layer.lora_B["default"](layer.lora_A["default"](x))
    weights = torch.softmax(-((torch.tanh(z)[..., None] - grid) ** 2) / (0.37 * 0.5**2), -1)
    wanted = layer.base_layer(x) + 0.1 * (weights * (grid + 0.2 * torch.sin(torch.pi * grid))).sum(-1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_presets_lead_from_the_first_version_to_the_defaults() -> None:
    plain = LSLoraConfig().options
    options = [LSLoraConfig.preset(name).options for name in PRESETS]
    assert list(PRESETS) == [f"V{i}" for i in range(8)]
    assert options[6] == options[7] == plain
    assert [o.spline_reg_weight for o in options] == [1e-4] * 6 + [0.01] * 2
    assert [o.spline_output_scale for o in options] == [0.1] * 4 + [1.0] * 4
    changed = [
        {name for name in vars(a) if getattr(a, name) != getattr(b, name)} for a, b in itertools.pairwise(options)
    ]
    assert changed == [
        {"spline_init"},
        {"k_min", "k_max"},
        {"spline_tanh"},
        {"spline_output_scale"},
        {"interpolation_method"},
        {"spline_reg_weight"},
        set(),
    ]
    assert LSLoraConfig.preset("V5", r=3, num_knots=9).num_knots == 9
    with pytest.raises(ValueError, match="a preset is one of V0, V1"):
        LSLoraConfig.preset("V8")


@pytest.mark.parametrize("kind", ["identity", "curvature"])
def test_the_penalty_is_the_formula(kind: str) -> None:
    model = splined(spline_regularizer=kind, spline_reg_weight=0.5, num_knots=4)
    values = np.stack([spline.values.numpy() for spline in splines_of(model).values()])
    wanted = np.mean((values - np.linspace(-3, 3, 4)) ** 2)
    if kind == "curvature":
        wanted = np.mean((values[:, 2:] - 2 * values[:, 1:-1] + values[:, :-2]) ** 2) / 2.0**2
    assert spline_penalty(model).item() == pytest.approx(0.5 * wanted, rel=1e-5)
    spline_penalty(model).backward()
    assert all(
        getattr(layer, VALUES)["default"].grad.any() for layer in model.modules() if isinstance(layer, SplineLayer)
    )
    with pytest.raises(ValueError, match="has no LS-LoRA adapter that is active"):
        spline_penalty(with_lora(tiny_llama()))


def test_facts_of_splines_on_disk_are_those_in_the_model(saved: Path) -> None:
    model = splined()
    found = read_splines(saved)
    assert found.keys() == splines_of(model).keys()
    spline, k = found[LAYER], np.linspace(-3, 3, 5)
    v = model.get_submodule(LAYER).lora_spline_values["default"].detach().numpy()
    facts = spline.facts()
    assert facts == splines_of(model)[LAYER].facts()
    assert facts["deviation"] == pytest.approx(np.abs(v - k).mean(), rel=1e-6)
    assert facts["slope_variance"] == pytest.approx(np.var(np.diff(v) / 1.5), rel=1e-5)
    assert facts["input_scale"] == pytest.approx(model.get_submodule(LAYER).lora_spline_input_scale["default"].item())
    z = torch.linspace(-4, 4, 33)
    wanted = facts["output_scale"] * np.interp(facts["input_scale"] * z.clamp(-3, 3).numpy(), k, v)
    np.testing.assert_allclose(spline(z).numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_knots": 7}, rf"should have \S+{VALUES} of shape \(7,\), got \(5,\)"),
        ({"peft_type": "LORA"}, "should say peft_type LSLORA, got 'LORA'"),
        (None, "should say peft_type LSLORA, got None"),
    ],
)
def test_a_config_that_does_not_fit_its_splines_is_refused(saved: Path, change: Any, complaint: str) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps([] if change is None else json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=complaint):
        read_splines(saved)


def test_with_tanh_the_input_scale_is_within_and_nothing_is_clamped() -> None:
    options = SplineOptions(spline_tanh=True, k_min=-0.5, k_max=0.5, interpolation_method="soft")
    z, values, one = (
        torch.linspace(-2, 2, 41),
        torch.randn(5, generator=torch.Generator().manual_seed(0)),
        torch.ones(1),
    )
    weights = torch.softmax(-((torch.tanh(1.7 * z)[:, None] - options.grid()) ** 2) / (0.37 * 0.25**2), -1)
    torch.testing.assert_close(options.apply(z, values, 1.7 * one, 0.3 * one), 0.3 * weights @ values)


def test_with_tanh_the_dtype_stays_too() -> None:
    options = SplineOptions(spline_tanh=True)
    z = torch.linspace(-2, 2, 9, dtype=torch.bfloat16)
    assert options.apply(z, *options.initial().values()).dtype == torch.bfloat16


def test_the_picture_has_what_a_spline_adds(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_fast.report import splines as report

    class Kept:
        of = staticmethod(lambda figure, *_: figure)

    monkeypatch.setattr(report, "Picture", Kept)
    spline = read_splines(saved)[LAYER]
    line = report.spline_picture({LAYER: spline}).axes[0].lines[0]
    z = np.linspace(-3, 3, report.POINTS)
    np.testing.assert_allclose(line.get_xdata(), z, atol=1e-6)
    y = spline.output_scale * np.interp(spline.input_scale * z, np.linspace(-3, 3, 5), spline.values.numpy())
    np.testing.assert_allclose(line.get_ydata(), y - z, atol=1e-5)


def test_the_picture_shows_every_kind_of_module(saved: Path, tmp_path: Path) -> None:
    from spectral_fast.report.splines import save_spline_picture, spline_picture

    save_spline_picture(tmp_path / "splines.png", read_splines(saved))
    assert (tmp_path / "splines.png").read_bytes().startswith(b"\x89PNG")
    assert spline_picture({"head": read_splines(saved)[LAYER]}).png
    with pytest.raises(ValueError, match="needs at least one"):
        spline_picture({})

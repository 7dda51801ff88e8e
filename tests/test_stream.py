"""g of the layer-major engine: that of the model in memory and of plain autograd, whatever is kept or read again."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_models import (
    ARGUMENTS,
    FAMILIES,
    SAMPLES,
    by_autograd,
    family_model,
    largest_difference,
    save,
    save_adapter,
    save_in_shards,
    stream,
)

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.model import ModelOptions, load_model
from spectral_fast.calibration.packed.decoder import Decoder
from spectral_fast.calibration.spectral_form import lora_layers
from spectral_fast.calibration.streaming.skeleton import load_skeleton
from spectral_fast.calibration.streaming.stream import streamed
from spectral_fast.calibration.streaming.weights import EMBEDDINGS, HEAD, OTHER
from spectral_fast.sensitivity import Sensitivity

BUDGETS = {"nothing": 0, "some": 100_000, "everything": 10**9}


def g_of(sensitivity: Sensitivity) -> dict[str, torch.Tensor]:
    return {name: module.samples for name, module in sensitivity.modules.items() if module.samples is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_g_per_sample_is_that_of_plain_autograd_and_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    model = save(tmp_path, family)
    wanted = by_autograd(model, ARGUMENTS["batch_size"])
    in_memory = calibrate(model, "default", SAMPLES, **ARGUMENTS)
    for budget in BUDGETS.values():
        got, _ = stream(tmp_path, budget)
        assert largest_difference(got, wanted) <= 1e-5
        assert largest_difference(got, g_of(in_memory)) <= 1e-5
        for name, module in got.modules.items():
            torch.testing.assert_close(module.s, in_memory.modules[name].s)


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_layers_that_return_tuples_can_be_streamed(family: str, tmp_path: Path) -> None:
    model = save(tmp_path, family)
    got, _ = stream(tmp_path)
    assert largest_difference(got, by_autograd(model, ARGUMENTS["batch_size"])) <= 1e-5


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_gives_what_the_model_in_memory_gives(dtype: str, budget: str, tmp_path: Path) -> None:
    save(tmp_path, changes={"initializer_range": 0.05})
    options = ModelOptions(dtype=dtype, device="cpu")
    model = load_model(str(tmp_path / "base"), options, Adapter.open(tmp_path / "adapter"))
    got, _ = stream(tmp_path, BUDGETS[budget], dtype)
    assert largest_difference(got, g_of(calibrate(model, "default", SAMPLES, **ARGUMENTS))) <= 1e-5


def with_large_gradients(tmp_path: Path, factor: float) -> None:
    """A model whose head is large on hidden states that are small: the gradient of the latter is large."""
    model = family_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.data *= factor
    model.model.norm.weight.data /= factor
    save_in_shards(model, tmp_path / "base")
    save_adapter(model, "llama", tmp_path / "adapter")


@pytest.mark.parametrize("budget", BUDGETS)
def test_float16_gradients_that_overflow_are_found_at_a_smaller_scale(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_fast.calibration.streaming.stream import _Sweeps

    with_large_gradients(tmp_path, 512.0)
    options = ModelOptions(dtype="fp16", device="cpu")
    model = load_model(str(tmp_path / "base"), options, Adapter.open(tmp_path / "adapter"))
    wanted = g_of(calibrate(model, "default", SAMPLES, **ARGUMENTS))
    scales: list[float] = []
    backward = _Sweeps._backward

    def stopping(self: Any, k: Any) -> None:
        scales.append(self.scale)
        if len(scales) == 2:
            raise KeyboardInterrupt
        backward(self, k)

    monkeypatch.setattr(_Sweeps, "_backward", stopping)
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path, BUDGETS[budget], "fp16")
    got, _ = stream(tmp_path, BUDGETS[budget], "fp16")
    assert largest_difference(got, wanted) <= 1e-2  # float16 rounds gradients of another scale elsewhere
    assert scales[-1] < 2.0**12
    assert len(list(tmp_path.glob("work*/*/*"))) == 1


def test_float16_gradients_that_overflow_at_any_scale_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []

    def overflowing(_: Any, hidden: Any, __: Any, scale: float, *___: Any) -> Any:
        scales.append(scale)
        return 1.0, torch.full_like(hidden, torch.inf)

    save(tmp_path)
    monkeypatch.setattr(Decoder, "loss_gradient", overflowing)
    with pytest.raises(ValueError, match=r"the sensitivity of .* is NaN or infinite; try --dtype bf16 or fp32"):
        stream(tmp_path, 0, "fp16")
    assert list(dict.fromkeys(scales)) == [2.0**12, 2.0**8, 2.0**4, 1.0]


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # PEFT's, of the bias of lora_B
@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
    ids=str,
)
def test_what_peft_adds_to_lora_is_part_of_the_pass(lora: dict[str, Any], tmp_path: Path) -> None:
    untied = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    model = save(tmp_path, changes=untied, **lora)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "magnitude" in name or name.endswith("lora_B.default.bias"):
            parameter.data *= 1.0 + 0.3 * torch.rand_like(parameter)
            parameter.data += 0.1 * torch.rand_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    wanted = calibrate(model, "default", SAMPLES, **ARGUMENTS)
    for budget in BUDGETS.values():
        got, _ = stream(tmp_path, budget)
        assert largest_difference(got, g_of(wanted)) <= 1e-5


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "o_proj"]], ids=str)
def test_a_module_of_the_head_can_be_measured(targets: list[str], tmp_path: Path) -> None:
    model = save(tmp_path, changes={"tie_word_embeddings": False}, target_modules=targets)
    got, weights = stream(tmp_path)
    assert largest_difference(got, g_of(calibrate(model, "default", SAMPLES, **ARGUMENTS))) <= 1e-5
    if len(targets) == 1:  # no layer is wanted twice
        assert weights.bytes_read == sum(weights.nbytes(part) for part in (EMBEDDINGS, OTHER, HEAD, *range(4)))


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_layer_is_read_twice_and_the_last_once(budget: str, tmp_path: Path) -> None:
    save(tmp_path)
    _, weights = stream(tmp_path, BUDGETS[budget])
    once = sum(weights.nbytes(part) for part in (EMBEDDINGS, OTHER, HEAD, 3))
    assert weights.bytes_read == once + 2 * sum(weights.nbytes(part) for part in range(3))


def test_nothing_is_read_twice_below_the_lowest_module(tmp_path: Path) -> None:
    model = save(tmp_path)
    names = [name for name in lora_layers(model, "default") if "layers.2.mlp" in name]
    got, weights = stream(tmp_path, modules=names)
    assert largest_difference(got, g_of(calibrate(model, "default", SAMPLES, modules=names, **ARGUMENTS))) <= 1e-5
    once = sum(weights.nbytes(part) for part in (EMBEDDINGS, OTHER, HEAD, 0, 1, 3))
    assert weights.bytes_read == once + 2 * weights.nbytes(2)


def test_one_layer_at_a_time_has_its_weights_and_kept_graphs_hold_none(tmp_path: Path) -> None:
    save(tmp_path)
    model, weights = load_skeleton(
        str(tmp_path / "base"), ModelOptions(device="cpu"), Adapter.open(tmp_path / "adapter")
    )
    in_place, mapped = [], []

    def looking(steps: Sequence[Any]) -> Iterator[Any]:
        for step in steps:
            gc.collect()
            there = {name for name, value in model.named_parameters() if not value.is_meta and "lora" not in name}
            in_place.append({name.split("layers.")[1][0] for name in there if "layers." in name})
            mapped.append(Path("/proc/self/maps").read_text().count(str(tmp_path / "base")))
            yield step

    engines = partial(streamed, weights=weights, folder=tmp_path, budget=10**9)
    calibrate(model, "default", SAMPLES, engines=engines, progress=looking, **ARGUMENTS)
    assert len(in_place) == 4 + 1 + 1 + 4
    assert all(len(layers) <= 1 for layers in in_place)
    files = [len({weights._shards[key].path for key in _keys(weights, part)}) for part in (OTHER, *range(4), HEAD)]
    assert max(mapped) <= sum(sorted(files)[-3:])  # in place, being read, and the final norm; not all layers
    assert Path("/proc/self/maps").read_text().count(str(tmp_path / "base")) == 0
    assert all(value.is_meta for name, value in model.named_parameters() if "lora" not in name)


def _keys(weights: Any, part: Any) -> list[str]:
    return [key for recipe in weights._recipes[part] for _, key in recipe.sources]


def test_no_samples_are_no_rows_and_no_reading(tmp_path: Path) -> None:
    model = save(tmp_path)
    skeleton, weights = load_skeleton(
        str(tmp_path / "base"), ModelOptions(device="cpu"), Adapter.open(tmp_path / "adapter")
    )
    names = list(lora_layers(model, "default"))
    with streamed(skeleton, "default", names, weights=weights, folder=tmp_path, budget=0) as engine:
        assert {name: tuple(g.shape) for name, g in engine([]).items()} == dict.fromkeys(names, (0, 4))
    assert weights.bytes_read == 0


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    model = family_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.data[0] = torch.nan
    save_in_shards(model, tmp_path / "base")
    save_adapter(model, "llama", tmp_path / "adapter")
    with pytest.raises(ValueError, match="the calibration loss is nan"):
        stream(tmp_path)


def test_a_disk_without_room_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"on disk, \d+\.\d kB, and 1\.0 kB are free; choose an --out_dir"):
        stream(tmp_path)

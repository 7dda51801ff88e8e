"""The pair of files that `probe` leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_fast.sensitivity import RECORD, TENSORS, ModuleSensitivity, Sensitivity

PARTS = "layers.1.o_proj.samples"


def example() -> Sensitivity:
    modules = {
        f"layers.{i}.o_proj": ModuleSensitivity(
            torch.linspace(3, 1, 4 + i, dtype=torch.float64), torch.randn(4 + i, dtype=torch.float64)
        )
        for i in range(3)
    }
    return Sensitivity(modules, {"adapter_sha256": "abc", "calib_samples": 32})


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved = example()
    saved.save(tmp_path)
    loaded = Sensitivity.load(tmp_path)
    assert list(loaded.modules) == list(saved.modules)
    assert dict(loaded.record) == dict(saved.record)
    for name, module in saved.modules.items():
        assert torch.equal(loaded.modules[name].s, module.s)
        assert torch.equal(loaded.modules[name].g, module.g)


def with_samples(n: int = 5) -> Sensitivity:
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: ModuleSensitivity.of_samples(module.s, torch.randn(n, len(module.s), generator=generator))
        for name, module in example().modules.items()
    }
    return Sensitivity(modules, {"adapter_sha256": "abc"})


def test_g_per_sample_is_saved_and_loaded(tmp_path: Path) -> None:
    saved = with_samples()
    saved.save(tmp_path)
    loaded = Sensitivity.load(tmp_path)
    assert loaded.samples is not None
    for name, module in saved.modules.items():
        assert torch.equal(loaded.samples[name], module.samples)
        assert torch.equal(loaded.modules[name].g, module.samples.double().sum(0))


def test_files_without_g_per_sample_have_none(tmp_path: Path) -> None:
    example().save(tmp_path)
    assert not [name for name in load_file(tmp_path / TENSORS) if name.endswith(".samples")]
    assert Sensitivity.load(tmp_path).samples is None


def test_g_may_be_added_in_any_order_but_is_the_sum_of_its_parts() -> None:
    """Parts that cancel to nothing: the bound is by what is added, not by g."""
    n = 1000
    samples = torch.randn(n, 3, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, n)[:, None]
    samples = torch.cat([samples, -samples, torch.full((1, 3), 1e-3)])
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    backward = sum(samples.double().flip(0), torch.zeros(3, dtype=torch.float64))
    assert not torch.equal(backward, ModuleSensitivity.of_samples(s, samples).g)
    ModuleSensitivity(s, backward, samples)
    with pytest.raises(ValueError, match=r"the 2001 samples must sum to g; in direction 1 they sum to"):
        ModuleSensitivity(s, backward + torch.tensor([0.0, 1e-3, 0.0]), samples)


@pytest.mark.parametrize(
    ("samples", "got"),
    [
        (torch.zeros(5, 3), r"\(5, 3\) float32"),
        (torch.zeros(4), r"\(4,\) float32"),
        (torch.zeros(()), r"\(\) float32"),
        (torch.zeros(0, 4), r"\(0, 4\) float32"),
        (torch.zeros(2, 4, 1), r"\(2, 4, 1\) float32"),
        (torch.zeros(5, 4, dtype=torch.int64), r"\(5, 4\) int64"),
        (torch.zeros(5, 4, dtype=torch.bfloat16), r"\(5, 4\) bfloat16"),
    ],
)
def test_samples_of_a_wrong_shape_or_dtype_are_refused(samples: torch.Tensor, got: str) -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"samples must be \(n, 4\) float32 .* got {got}"):
        ModuleSensitivity(zeros, zeros, samples)


def test_all_modules_have_the_same_samples_or_none() -> None:
    modules = dict(with_samples().modules)
    other = with_samples(6).modules["layers.1.o_proj"]
    with pytest.raises(ValueError, match=r"layers.0.o_proj has 5, layers.1.o_proj has 6"):
        Sensitivity({**modules, "layers.1.o_proj": other})
    with pytest.raises(ValueError, match=r"layers.0.o_proj has 5, layers.1.o_proj has none"):
        Sensitivity({**modules, "layers.1.o_proj": example().modules["layers.1.o_proj"]})


def change(key: str, to: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Damage that replaces a tensor in files with g per sample, or removes it."""

    def damage(folder: Path) -> None:
        with_samples().save(folder)
        tensors = load_file(folder / TENSORS)
        value = to(tensors.pop(key))
        save_file(tensors if value is None else {**tensors, key: value}, folder / TENSORS)

    return damage


def break_json(folder: Path) -> None:
    (folder / RECORD).write_text("{")


def break_tensors(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9])


def change_format(folder: Path) -> None:
    (folder / RECORD).write_text(json.dumps({"format": 99}))


def mix_two(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "modules": ["layers.0.o_proj"]}))


def put_nan(folder: Path) -> None:
    modules = dict(example().modules)
    modules["layers.1.o_proj"].g[2] = float("nan")
    Sensitivity(modules, {}).save(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, "damaged"),
        (break_tensors, "damaged"),
        (change_format, "not a sensitivity record of format"),
        (mix_two, "do not belong together"),
        (put_nan, "NaN or infinity in layers.1.o_proj"),
        (change(PARTS, lambda t: t * torch.tensor([1, 1, float("nan"), 1, 1])), f"NaN or infinity in {PARTS}"),
        (change(PARTS, lambda t: t[:, 1:].contiguous()), r"layers.1.o_proj: samples must be \(n, 5\) .* probe again"),
        (change(PARTS, lambda t: t.half()), "layers.1.o_proj: samples must be .* float16; probe again"),
        (change(PARTS, lambda t: t[:0]), r"layers.1.o_proj: samples must be .* got \(0, 5\)"),
        (change(PARTS, lambda t: t[:4].contiguous()), "layers.1.o_proj: the 4 samples must sum to g"),
        (
            change(PARTS, lambda t: torch.cat([t, torch.zeros(1, 5)])),
            "modules must have g of the same samples; layers.0.o_proj has 5, layers.1.o_proj has 6; probe again",
        ),
        (change(PARTS, lambda _: None), f"do not belong together.*{PARTS} is in one only"),
        (change("layers.1.o_proj.g", lambda t: t + 1), "layers.1.o_proj: the 5 samples must sum to g"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    example().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Sensitivity.load(tmp_path)


def test_a_folder_without_the_files_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="spectral-fast probe"):
        Sensitivity.load(tmp_path)

"""The pair of files that `probe` leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectral_fast.sensitivity import RECORD, TENSORS, ModuleSensitivity, Sensitivity


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
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: object, message: str) -> None:
    example().save(tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Sensitivity.load(tmp_path)


def test_a_folder_without_the_files_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="spectral-fast probe"):
        Sensitivity.load(tmp_path)

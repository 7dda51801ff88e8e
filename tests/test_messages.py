"""What a new user runs into first is told in words that help."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from spectral_fast import ModelOptions, embedded
from spectral_fast.calibration.model import from_pretrained
from spectral_fast.cli import main


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(word) for word in argv]) == 1
    return capsys.readouterr().err.rstrip("\n")


def test_what_the_file_system_refuses_is_told_as_the_file_and_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    said = refused(capsys, "resize", "--lora_path", embedded.adapter_dir(), "--rank", 4, "--out_dir", tmp_path)
    assert said.endswith(f"error: {tmp_path}: out_dir is not empty; choose another one, or --overwrite")


class Nowhere:
    @staticmethod
    def from_pretrained(*_: object, **__: object) -> None:
        raise OSError("no such model")


def test_a_misspelt_base_model_is_told_the_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"\(no such model\); did you mean {tmp_path / 'model'}\?$"):
        from_pretrained(Nowhere, str(tmp_path / "modell"), ModelOptions())


def test_the_command_that_a_probe_proposes_next_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["probe", "--base_model", embedded.base_model_dir(), "--lora_path", embedded.adapter_dir()]
    words += ["--calib_data", embedded.calibration_file(), "--calib_samples", 2, "--out_dir", "a probe"]
    assert main([*map(str, words), "--target_modules", "q_proj", "v_proj", "--layer_max", "1"]) == 0
    [proposed] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert main(shlex.split(proposed)[2:]) == 0
    assert "edited 4 modules" in capsys.readouterr().out

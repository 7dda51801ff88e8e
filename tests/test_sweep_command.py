"""`spectral-fast sweep` as a user types it, on the embedded model by transformers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweep_tools import write_configs

from spectral_fast import embedded
from spectral_fast.cli import main


def test_a_sweep_of_the_embedded_adapter_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"lora_local_path: {embedded.adapter_dir()}\nedit_mode: [abs_select, gd]\neta: 4.0\n")
    command = ["sweep", str(grid), "--out_dir", str(tmp_path / "out"), "--engine", "transformers", "--controls", "1"]
    command += ["--base_model", str(embedded.base_model_dir()), "--calib_data", str(embedded.calibration_file())]
    command += ["--calib_samples", "4", "--eval_data", str(embedded.heldout_file()), "--fewshot", "0"]
    command += ["--max_samples", "8", "--max_tokens", "96", "--json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "2 configurations: 2 variants, 1 baseline, 1 control; 0 are finished, 4 to do in 4 groups" in err
    scores = {run["label"]: run["score"] for run in result["runs"]}
    assert scores["original"] > 0.3  # of 512 problems it solves 72 %
    assert scores["gd"] == 0  # steps of that size destroy the adapter
    assert Path(result["report"]).is_file()
    assert main(command[:-1]) == 0
    out, err = capsys.readouterr()
    assert "4 are finished, 0 to do" in err
    assert "not distinguishable" in out or "worse than the original" in out


@pytest.mark.parametrize(
    ("flags", "line", "message"),
    [
        (["--workers", "2"], {}, "--workers needs --ray"),
        (["--controls", "-1"], {}, "--controls must be at least 0"),
        ([], {"task": "humaneval_full"}, "--allow_code_execution"),
    ],
)
def test_a_sweep_that_cannot_be_meant_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], line: dict, message: str
) -> None:
    configs = write_configs(tmp_path, [{"edit_mode": "random_index", **line}])
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", str(configs), "--out_dir", str(tmp_path / "out"), *flags])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_configuration_is_an_error_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = write_configs(tmp_path, [{"edit_mode": "random_index"}, {"amp_fctor": 2}])
    assert main(["sweep", str(configs), "--out_dir", str(tmp_path / "out")]) == 1
    assert "configs.jsonl line 2: unknown key 'amp_fctor'; is amp_factor meant?" in capsys.readouterr().err

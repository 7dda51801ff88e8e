"""`spectral-fast ranks` as a user types it, on the embedded model."""

from __future__ import annotations

import csv
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from spectral_fast import embedded
from spectral_fast.cli import main

BASE = ["ranks", "--base_model", str(embedded.base_model_dir())]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return status, out, err


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "ranks.json").read_text())["lora_config"]
    return found


def test_it_writes_a_table_a_config_for_peft_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    out_dir = tmp_path / "ranks"
    status, out, err = run(capsys, *BASE, "--out_dir", out_dir, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["files"] == ["ranks.csv", "ranks.json", "ranks.png", "spectra-1.png", "spectra-2.png"]
    assert sorted(file.name for file in out_dir.iterdir()) == result["files"]
    assert "lm_head is adapted" in err
    status, out, err = run(capsys, *BASE, "--out_dir", out_dir, "--overwrite", "--exclude_modules", "lm_head", "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    for name in result["files"][2:]:
        header = (out_dir / name).read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", header[16:24])) > 300
    with (out_dir / "ranks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["layers"] == 28
    assert {row["layer_name"]: int(row["rank_pattern"]) for row in rows if row["rank_pattern"] != "0"} == (
        config_of(out_dir)["rank_pattern"]
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(embedded.base_model_dir()), LoraConfig(**config_of(out_dir))
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == result["parameters"]


def test_a_budget_is_met_and_the_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--budget_params", 200_000, "--exclude_modules", "lm_head", "--no_pictures"]
    status, out, err = run(capsys, *BASE, "--out_dir", tmp_path / "ranks", *flags)
    assert (status, err) == (0, "")
    record = json.loads((tmp_path / "ranks" / "ranks.json").read_text())
    assert abs(record["parameters"] - 200_000) <= 2_000
    assert record["budget_params"] == 200_000
    for name, rank in record["lora_config"]["rank_pattern"].items():
        [line] = [line for line in out.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[-2:] == [str(rank), str(2 * rank)]


def test_a_preset_changes_what_flags_do_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = []
    for name, flags in {
        "paper": [],
        "source": ["--preset", "source"],
        "both": ["--preset", "source", "--select", "largest"],
    }.items():
        assert run(capsys, *BASE, "--out_dir", tmp_path / name, "--no_pictures", *flags)[0] == 0
        records.append(json.loads((tmp_path / name / "ranks.json").read_text()))
    said = [(r["power_law_fitting_method"], r["select"], r["rescale"]) for r in records]
    assert said == [
        ("median", "largest", True),
        ("goodness-of-fit", "smallest", False),
        ("goodness-of-fit", "largest", False),
    ]


def test_ranks_come_from_what_probe_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--calib_data", embedded.calibration_file(), "--calib_samples", 2]
    lora = ["--lora_path", embedded.adapter_dir(), "--target_modules", "all-linear"]
    assert run(capsys, "probe", *BASE[1:], *lora, *data, "--out_dir", tmp_path / "probed")[0] == 0
    where = ["--sensitivity", tmp_path / "probed", "--out_dir", tmp_path / "ranks"]
    status, out, err = run(capsys, *BASE, *where, "--budget_uniform_rank", 8)
    assert (status, err) == (0, "")
    assert "sensitivity" in out.splitlines()[0]
    assert sorted(file.name for file in (tmp_path / "ranks").iterdir()) == ["ranks.csv", "ranks.json", "ranks.png"]
    names = json.loads((tmp_path / "probed" / "sensitivity.json").read_text())["modules"]
    assert {f"base_model.model.{name}" for name in config_of(tmp_path / "ranks")["rank_pattern"]} < set(names)
    with pytest.raises(SystemExit):
        main([*BASE, *map(str, where), "--overwrite", "--hill_weight", "1"])
    assert "--hill_weight is about spectra" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*BASE, *map(str, where), "--overwrite", "--preset", "source"])
    assert "--preset is about spectra" in capsys.readouterr().err
    twin = shutil.copytree(embedded.base_model_dir(), tmp_path / "twin")
    status, _, err = run(capsys, "ranks", "--base_model", twin, *where, "--overwrite", "--no_pictures")
    assert status == 0
    assert f"was probed on {embedded.base_model_dir()}, not on {twin}: are they the same model?" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget_params", 10], "a budget of 10 parameters cannot be met: the 14 selected layers take"),
        (["--layer_selection_percentile", 0.01], "of 29 layers is none"),
        (["--target_modules", "qkv"], "no layer is called qkv; the model has down_proj, gate_proj"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    flags: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, *BASE, "--out_dir", tmp_path / "ranks", *flags)
    assert status == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget_params", "10", "--budget_uniform_rank", "3"], "exclude each other"),
        (["--minimum_rank", "9", "--maximum_rank", "8"], "minimum_rank must not be above maximum_rank"),
        (["--maximum_rank", str(10**25)], "--maximum_rank: must be 1 to 65536"),
    ],
)
def test_flags_that_cannot_be_are_a_wrong_command_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*BASE, "--out_dir", str(tmp_path / "ranks"), *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    status, _, err = run(capsys, *BASE, "--out_dir", tmp_path, "--overwrite")
    assert status == 1
    assert "has no ranks.json" in err
    status, _, err = run(capsys, *BASE, "--out_dir", embedded.base_model_dir() / "ranks")
    assert status == 1
    assert "must not contain each other" in err

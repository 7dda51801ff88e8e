"""The comparison of LS-LoRA with LoRA pairs the same problems and the same seeds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import spline


def made(arm: str, seed: int, solved: str, loss: float) -> spline.Run:
    correct = {(i, "7"): digit == "1" for i, digit in enumerate(solved)}
    facts = {} if arm == spline.LORA else dict.fromkeys(spline.FACTS, 0.1 + seed)
    return spline.Run(arm, seed, 100, {"train_loss": 1.0, "eval_loss": loss}, correct, facts, {})


def test_an_arm_is_compared_with_lora_problem_by_problem_and_seed_by_seed() -> None:
    solved = dict.fromkeys(spline.ARMS, ("1100", "1000")) | {"soft": ("1110", "1011")}
    loss = dict.fromkeys(spline.ARMS, (0.5, 0.6)) | {"soft": (0.4, 0.55)}
    runs = [made(arm, seed, solved[arm][seed], loss[arm][seed]) for seed in (0, 1) for arm in spline.ARMS]
    rows = {(row["arm"], row["seed"]): row for row in spline.table(runs)}
    assert rows["soft", "1"]["difference"] == "+0.5000"
    assert (rows["soft", "1"]["only_lora"], rows["soft", "1"]["only_this"]) == (0, 2)
    assert rows["soft", "0"]["accuracy_low"] == ""
    pooled = rows["soft", "all"]
    assert (pooled["accuracy"], pooled["difference"], pooled["accuracy_seeds"]) == ("0.7500", "+0.3750", "+0.3750")
    # Differences 0.25 and 0.5: 0.375 ± 12.706 · 0.125; of the losses -0.1 and -0.05: -0.075 ± 12.706 · 0.025.
    assert (pooled["accuracy_low"], pooled["accuracy_high"]) == ("-1.2133", "+1.9633")
    assert (pooled["eval_loss_low"], pooled["eval_loss_high"]) == ("-0.3927", "+0.2427")
    assert (pooled["deviation"], rows["lora", "all"]["deviation"]) == ("0.6000", "")


def test_a_tiny_run_writes_its_table_and_its_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms: dict[str, Any] = {name: spline.ARMS[name] for name in (spline.LORA, "piecewise")}
    monkeypatch.setattr(spline, "ARMS", arms)
    out, picture, threads = tmp_path / "table.csv", tmp_path / "splines.png", torch.get_num_threads()
    words = ["--seeds", "1", "--steps", "1", "--problems", "2", "--out", str(out), "--picture", str(picture)]
    assert spline.main(words) == 0
    torch.set_num_threads(threads)
    assert "piecewise" in capsys.readouterr().out
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["arm"] for row in rows] == [*arms, *arms]
    assert int(rows[1]["parameters"]) - int(rows[0]["parameters"]) == 28 * (5 + 2)
    assert float(rows[1]["reach"]) >= 0
    assert picture.read_bytes().startswith(b"\x89PNG")

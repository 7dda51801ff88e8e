"""The comparison of adaptive ranks with one rank pairs the same problems and the same seeds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import adaptive


def made(arm: str, seed: int, solved: str) -> adaptive.Run:
    correct = {(i, "7"): digit == "1" for i, digit in enumerate(solved)}
    return adaptive.Run(arm, seed, 100, [4, 9], 0.5, correct)


def test_an_arm_is_compared_with_the_uniform_rank_of_its_seed_and_with_all_of_them() -> None:
    solved = {
        "uniform": ("1100", "1000"),
        "paper": ("1110", "1011"),
        "source": ("0000", "0000"),
        "paper_all": ("1111", "1111"),
    }
    runs = [made(arm, seed, solved[arm][seed]) for seed in (0, 1) for arm in adaptive.ARMS]
    rows = {(row["arm"], row["seed"]): row for row in adaptive.table(runs)}
    assert rows["paper", 0]["difference"] == "+0.2500"
    assert (rows["paper", 1]["only_uniform"], rows["paper", 1]["only_this"]) == (0, 2)
    assert rows["source", 1]["accuracy"] == "0.0000"
    assert rows["uniform", "all"]["difference"] == "+0.0000"
    pooled = rows["paper", "all"]
    assert (pooled["accuracy"], pooled["difference"], pooled["problems"]) == ("0.7500", "+0.3750", 4)
    assert (pooled["only_uniform"], pooled["only_this"]) == (0, 2)  # of the problems, by their share of the seeds


def test_a_tiny_run_writes_its_table_at_equal_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.csv"
    threads = torch.get_num_threads()
    assert adaptive.main(["--seeds", "1", "--steps", "1", "--problems", "2", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    assert "paper" in capsys.readouterr().out
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["arm"] for row in rows] == [*adaptive.ARMS, *adaptive.ARMS]
    assert all(abs(float(row["of_uniform"]) - 1) <= 0.01 for row in rows)
    assert {row["problems"] for row in rows} == {"2"}
    assert all(row["command"].startswith("python -m benchmarks.adaptive --seeds 1") for row in rows)

"""Figures that README and docs show of measurements are those of benchmarks/results."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = {"s": 1.0, "ms": 1e-3}


def results(pattern: str) -> list[dict[str, str]]:
    rows = []
    for file in sorted(RESULTS.glob(pattern)):
        with file.open(encoding="utf-8") as stream:
            rows += list(csv.DictReader(stream))
    return rows


def times(page: Path) -> list[str]:
    """Times that a table's second and third column begin with: ours, and that of what a user would run today."""
    tables = re.findall(r"^\| work \|.*?\n\n", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    cells = [row.split("|") for table in tables for row in table.splitlines()]
    return [found[0] for row in cells for cell in row[2:4] if (found := re.match(r" [\d.]+ m?s\b", cell))]


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_every_time_of_the_tables_was_measured(page: str) -> None:
    medians = [float(row["median_s"]) for row in results("intel*.csv")]
    shown = times(ROOT / page)
    assert len(shown) > 15
    absent = []
    for time in shown:
        number, unit = time.split()
        digits = len(number.replace(".", "").lstrip("0") if "." in number else number.rstrip("0"))
        if float(number) not in (float(f"{median / SECONDS[unit]:.{digits}g}") for median in medians):
            absent.append(time)
    assert absent == []


@pytest.mark.parametrize("name", ["adaptive-ranks", "spline-lora"])
def test_right_answers_of_the_experiments_are_those_of_every_seed(name: str) -> None:
    rows = results(f"{name}.csv")
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for arm in {row["arm"] for row in rows}:
        right = {row["seed"]: f"{100 * float(row['accuracy']):.1f}" for row in rows if row["arm"] == arm}
        assert f"{right['all']} ({right['0']}, {right['1']}, {right['2']})" in page, arm


def test_losses_of_the_gates_are_those_of_the_experiment() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for row in results("gate.csv"):
        if row["seed"] == "all":
            losses = [float(row[name]) for name in ("loss", "random", "all_at_equal_steps", "all_at_equal_data")]
            told = " | ".join([f"{float(row['accepted']):.0f}", *(f"{loss:.3f}" for loss in losses)])
            assert f"| {told} | {100 * float(row['accuracy']):.1f} |" in page, row["gate"]

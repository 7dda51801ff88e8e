"""The comparison of gates with random skipping: runs of one seed in pairs, curves cut at equal steps and equal data."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch

from benchmarks import experiment, gate, novelty


def made(arm: str, seed: int, losses: list[float], accepted: int, solved: str) -> gate.Run:
    """A run of 100 micro-batches."""
    curve = [(50, min(50, accepted), losses[0]), (100, accepted, losses[1])]
    return gate.Run(arm, seed, accepted / 100, curve, 1.0, {(i, "7"): x == "1" for i, x in enumerate(solved)})


def test_a_gate_stands_beside_its_control_and_beside_all_at_equal_steps_and_equal_data() -> None:
    pairs = []
    for seed, (loss, control) in enumerate([(0.2, 0.3), (0.1, 0.24)]):
        every = made("all", seed, [0.5, 0.1], 100, "11")
        control_run = made("random", seed, [0.4, control], 58, "00")
        pairs += [(made(arm, seed, [0.4, loss], 60, "10"), control_run, every) for arm in gate.GATES]
    rows = {(row["gate"], row["seed"]): row for row in gate.table(pairs)}
    one = rows["novelty", 0]
    assert (one["loss"], one["random"], one["minus_random"]) == ("0.2000", "0.3000", "-0.1000")
    assert (one["all_at_equal_steps"], one["all_at_equal_data"]) == ("0.4200", "0.1000")
    pooled = rows["both", "all"]
    assert (pooled["accepted"], pooled["accepted_by_control"], pooled["minus_random"]) == ("60.0", "58.0", "-0.1200")
    half = 12.706 * 0.02  # t with one degree of freedom, times the standard error
    assert float(pooled["high"]) == pytest.approx(-0.12 + half, abs=1e-4)
    assert (pooled["accuracy"], pooled["accuracy_random"], pooled["accuracy_all"]) == ("0.5000", "0.0000", "1.0000")
    assert gate.verdict(pooled).endswith("not told apart")
    # From the burn-in, at 32, to 58 the control goes down by 0.1 or 0.16 in its last 8; the gate by 8 / 10 of its own.
    along = [fmean(-(n - 50) * step for n in range(51, 59)) * 8 / 27 for step in (0.02 - 0.0125, 0.03 - 0.02)]
    assert float(pooled["along"]) == pytest.approx(fmean(along), abs=1e-4)
    assert gate.verdict({**pooled, "high": "-0.0100"}).endswith("not told apart")
    assert gate.verdict({**pooled, "high": "-0.0100", "along_high": "-0.0100"}).endswith("better")


def test_the_interval_of_paired_differences_is_students() -> None:
    low, high = experiment.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert math.isnan(experiment.interval([1.0])[0])


def test_a_tiny_run_writes_its_table_and_its_picture_and_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "GATES", {"novelty": "novelty"})
    monkeypatch.setattr(gate, "LABELS", {arm: gate.LABELS[arm] for arm in ("all", "novelty", "random")})
    monkeypatch.setattr(gate, "HELD_OUT", 2)
    out, picture, keep = tmp_path / "table.csv", tmp_path / "curves.png", tmp_path / "runs"
    words = ["--seeds", "1", "--steps", "3", "--problems", "1", "--out", str(out), "--picture", str(picture)]
    threads = torch.get_num_threads()
    assert gate.main([*words, "--keep", str(keep)]) == 0
    told = capsys.readouterr().out
    assert "novelty: loss" in told
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["gate"], row["seed"], row["seen"]) for row in rows] == [("novelty", "0", "3"), ("novelty", "all", "3")]
    monkeypatch.setattr(experiment, "train", None)  # nothing is left to train
    assert gate.main([*words, "--keep", str(keep)]) == 0
    torch.set_num_threads(threads)
    assert capsys.readouterr().out == told


def test_novelties_are_compared_by_their_ranks_within_blocks() -> None:
    assert novelty.correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1)
    assert novelty.correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    found = [novelty.Look(i / 200, -i / 200, 1.0 + i % 100, 0.3, i % 4 == 0) for i in range(200)]
    first, last = novelty.table(found)
    assert (first["until"], last["until"]) == (100, 200)
    assert (first["accepted"], first["novelty"], first["rank_correlation"]) == ("0.25", "0.247", "-1.000")
    assert first["with_loss"] == "+1.000"


def test_a_short_watch_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novelty, "BLOCK", 3)
    threads = torch.get_num_threads()
    assert novelty.main(["--steps", "6", "--burn_in", "2", "--out", str(tmp_path / "table.csv")]) == 0
    torch.set_num_threads(threads)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["until"] for row in rows] == ["3", "6"]
    assert float(rows[0]["novelty"]) > 0.3  # the first is new altogether

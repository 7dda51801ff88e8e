"""Gated training by several processes: one decision for all, and the gradient of one process with as many rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from gated_tools import SIZES, Scripted, rows, same, trainer, weights
from tiny_models import tiny_llama, with_lora

from spectral_fast.training import HeadGradientGate
from spectral_fast.training.gate import Gate, LossFloorGate, NoveltyAndLossGate

RANKS = 2
CASES: dict[str, dict[str, Any]] = {
    "the last of a window rejected": {"gradient_accumulation_steps": 2},
    "whole windows rejected": {"gradient_accumulation_steps": 1},
    "ranks that disagree": {"gradient_accumulation_steps": 2},
    "by loss": {"gradient_accumulation_steps": 2},
    "by novelty": {"gradient_accumulation_steps": 2, "max_steps": 8},
    "by means of ranks": {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
}
ONE_PROCESS_TOO = [case for case in CASES if not case.startswith(("by novelty", "by means"))]

SCRIPT = """
import sys
from pathlib import Path
import test_gated_ranks as tests
tests.work(Path(sys.argv[1]))
"""


def gate(case: str, rank: int) -> Gate:
    if case == "by loss":
        return LossFloorGate(0.5, burn_in=1)
    if case == "by novelty":
        return HeadGradientGate(**SIZES, target_novelty=0.5, burn_in=2)
    if case == "ranks that disagree" and rank > 0:
        return Scripted("nyny")
    return Scripted("ynyn" if case != "whole windows rejected" else "nny")


def train(case: str, out: Path, rank: int, size: int) -> dict[str, Any]:
    """The rows of a step are the same, whether one process has four of them or two have two."""
    how = {"per_device_train_batch_size": 4 // size, "train_sampling_strategy": "sequential", **CASES[case]}
    data = rows(32)
    for row in data[2:4] if case == "by means of ranks" else []:  # the second rank's, which has fewer in its window so
        row["labels"][:-1] = [-100] * (len(row["labels"]) - 1)
    made = trainer(out / case, gate(case, rank), data, **how)
    made.train()
    return {"weights": weights(made), "history": history(made), "rate": made.lr_scheduler.get_last_lr()}


def history(trained: Any) -> dict[str, Any]:
    """A copy: CPython 3.13.0 empties the lists in an object's own dictionary once it collects the object."""
    return dict(vars(trained.history))


def resume(out: Path) -> list[dict[str, Any]]:
    """A whole training, and one that goes on from its middle."""
    found = []
    for checkpoint in (None, str(out / "whole" / "checkpoint-4")):
        asked = NoveltyAndLossGate(**SIZES, target_novelty=0.6, burn_in=2, seed=3)
        how = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 8}
        how |= {"save_strategy": "steps", "save_steps": 4}
        model = with_lora(tiny_llama(), lora_dropout=0.2)
        made = trainer(out / ("later" if checkpoint else "whole"), asked, rows(32), model=model, **how)
        made.train(resume_from_checkpoint=checkpoint)
        found.append({"weights": weights(made), "history": history(made)})
        torch.distributed.barrier()
    return found


def work(out: Path) -> None:
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {case: train(case, out, rank, RANKS) for case in CASES}
    torch.save({**results, "resumed": resume(out)}, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    results = forked.ranks(RANKS, SCRIPT, str(out))
    assert [result.returncode for result in results] == [0] * RANKS, [result.stderr for result in results]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same_weights_and_took_the_same_decisions(by_ranks: list[Any], case: str) -> None:
    first, second = (results[case] for results in by_ranks)
    assert first["history"] == second["history"]
    assert all(torch.equal(a, second["weights"][name]) for name, a in first["weights"].items())
    assert 0 < sum(first["history"]["accepts"]) < len(first["history"]["accepts"])


@pytest.mark.parametrize("case", ONE_PROCESS_TOO)
def test_ranks_train_as_one_process_with_all_their_rows(by_ranks: list[Any], case: str, tmp_path: Path) -> None:
    got, wanted = by_ranks[0][case], train(case, tmp_path, 0, 1)
    assert got["history"]["accepts"] == wanted["history"]["accepts"]
    assert got["history"]["optimizer_steps"] == wanted["history"]["optimizer_steps"]
    assert got["history"]["losses"] == pytest.approx(wanted["history"]["losses"], rel=1e-5)
    assert got["rate"] == wanted["rate"]
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-3, atol=1e-4)


def test_ranks_go_on_from_a_checkpoint_bit_for_bit(by_ranks: list[Any]) -> None:
    for results in by_ranks:
        whole, later = results["resumed"]
        assert whole["history"] == later["history"]
        assert same(whole["weights"], later["weights"])
        assert 0 < sum(whole["history"]["accepts"]) < 16

"""What a gated training makes of its rows: micro-batches without a label, short windows, evaluation between steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_tools import SIZES, Scripted, arguments, collate, logged, rows, same, trainer, weights
from tiny_models import tiny_llama, with_lora
from transformers import IntervalStrategy

from spectral_fast.training import GatedTrainer, HeadGradientGate
from spectral_fast.training.gate import LossFloorGate


def test_losses_shown_are_means_over_the_tokens_of_each_micro_batch(tmp_path: Path) -> None:
    data = rows(8)
    made = trainer(
        tmp_path, Scripted("n"), data, gradient_accumulation_steps=4, max_steps=1, train_sampling_strategy="sequential"
    )
    made.train()
    model = made.model.eval()
    with torch.no_grad():
        wanted = [model(**collate(data[i : i + 2])).loss.item() for i in range(0, 8, 2)]
    assert [shown[0] for shown in made.gate.shown] == pytest.approx(wanted, rel=1e-5)
    assert not math.isclose(wanted[0], wanted[1], rel_tol=1e-3)


def unlabelled(data: list[dict[str, list[int]]], which: set[int]) -> list[dict[str, list[int]]]:
    """The rows, of which those of some micro-batches of two have no label."""
    return [{**row, "labels": [-100] * len(row["labels"])} if i // 2 in which else row for i, row in enumerate(data)]


@pytest.mark.parametrize("window", [1, 2])
def test_a_micro_batch_without_a_label_teaches_nothing_and_ends_nothing(tmp_path: Path, window: int) -> None:
    data = unlabelled(rows(), {1, 4})
    how = {"gradient_accumulation_steps": window, "max_steps": 8 // window, "train_sampling_strategy": "sequential"}
    plain, made = (trainer(tmp_path, gate, data, **how) for gate in (None, HeadGradientGate(**SIZES, burn_in=8)))
    plain.train()
    made.train()
    assert same(weights(plain), weights(made))
    assert logged(plain, "loss") == logged(made, "loss")
    assert [i for i, loss in enumerate(made.history.losses) if loss is None] == [1, 4]
    assert [i for i, novelty in enumerate(made.history.novelties) if novelty == 0] == [1, 4]


def test_a_micro_batch_without_a_label_does_not_move_the_loss_floor(tmp_path: Path) -> None:
    how = {
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.0,
        "train_sampling_strategy": "sequential",
    }
    made = trainer(tmp_path, LossFloorGate(0.5), unlabelled(rows(), {0, 3, 5}), **how)
    made.train()
    wanted = LossFloorGate(0.5)
    for loss in made.history.losses:
        if loss is not None:
            wanted.floor.step(loss)
    assert made.gate.floor.level == pytest.approx(wanted.floor.level, rel=1e-6)
    assert not any(made.history.accepts[i] for i in (0, 3, 5))


def test_evaluation_is_not_shown_to_the_gate(tmp_path: Path) -> None:
    def made() -> Any:
        gate = HeadGradientGate(**SIZES, target_novelty=0.9, target_novelty_scaler=50.0, burn_in=1)
        return trainer(tmp_path, gate, max_steps=8)

    whole, seen = made(), made()
    seen.eval_dataset, seen.args.eval_strategy, seen.args.eval_steps = rows(4, 1), IntervalStrategy.STEPS, 1
    whole.train()
    seen.train()
    assert len(logged(seen, "eval_loss")) == 8
    assert vars(seen.history) == vars(whole.history)
    assert 0 < sum(seen.history.accepts) < 8
    assert not seen._head._backbone._forward_hooks
    assert not seen._head._model._forward_hooks


def test_an_optimizer_and_a_schedule_that_are_given_rest_too(tmp_path: Path) -> None:
    model = with_lora(tiny_llama())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    how = {"train_dataset": rows(), "data_collator": collate, "optimizers": (optimizer, schedule)}
    GatedTrainer(model, arguments(tmp_path, max_steps=7), gate=Scripted("nyn"), **how).train()
    assert schedule.last_epoch == 2


def test_the_windows_that_end_an_epoch_are_shorter(tmp_path: Path) -> None:
    how = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    how |= {"train_sampling_strategy": "sequential"}
    plain, made, rested = (
        trainer(tmp_path, gate, rows(10), **how) for gate in (None, Scripted("y"), Scripted("yyyyn"))
    )
    for each in (plain, made, rested):
        each.train()
    assert same(weights(plain), weights(made))
    assert (rested.state.global_step, rested.history.optimizer_steps) == (6, 4)

"""Gates that look at the loss: alone, and beside the novelty. Source: Jiang et al. 2019, "Selective-Backprop"."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from spectral_fast.training.gate.base import Gate, Mean, alone
from spectral_fast.training.gate.controllers import LossFloor
from spectral_fast.training.gate.head_gradient import HeadGradientGate, unit


class LossFloorGate(Gate):
    """Accepts a micro-batch whose loss is above a quantile of the losses of late, so that a wanted share is.

    Args:
        target: that share; the quantile is 1 − target.
        burn_in, seed: see `Gate`; nothing is drawn.
        rate: of the moving averages, see `LossFloor`.
    """

    def __init__(self, target: float, burn_in: int = 0, seed: int = 0, rate: float = 0.05) -> None:
        super().__init__(target, burn_in, seed)
        self.floor = LossFloor(1 - self.target, rate)
        self._loss = math.nan

    def decide(self, loss: float, hidden: Tensor, logits: Tensor, labels: Tensor, mean: Mean = alone) -> bool:  # noqa: ARG002
        """By the loss, the mean of the ranks'."""
        self._loss = float(mean(torch.tensor(loss, dtype=torch.float32, device=hidden.device)))
        return self.burning_in or self._loss > self.floor.floor

    def stepped(self) -> None:
        """Moves the floor."""
        super().stepped()
        self.floor.step(self._loss)

    def metrics(self) -> dict[str, float]:
        """The floor."""
        return {"loss_floor": self.floor.floor}

    def state_dict(self) -> dict[str, Any]:
        """With the floor."""
        return {**super().state_dict(), "floor": asdict(self.floor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """With the floor."""
        super().load_state_dict(state)
        self.floor.load(state["floor"])


class NoveltyAndLossGate(HeadGradientGate):
    """Accepts what is both above the loss floor and accepted for its novelty, so that a wanted share is both.

    The floor lets √target pass; tau is moved until, of all micro-batches, the target is accepted.

    Args:
        rate: of the floor's moving averages.
        others: those of `HeadGradientGate`.
    """

    def __init__(self, *others: Any, rate: float = 0.05, **named: Any) -> None:
        super().__init__(*others, **named)
        self.floor = LossFloor(1 - math.sqrt(self.target), rate)
        self._loss = math.nan

    def decide(self, loss: float, hidden: Tensor, logits: Tensor, labels: Tensor, mean: Mean = alone) -> bool:
        """By both; the novelty's draw is made in any case."""
        z = self._embedded(hidden, logits, labels)
        together = mean(torch.cat([z.new_tensor([loss]), z]))
        self._loss, self._z = float(together[0]), z if mean is alone else unit(together[1:])
        novel = self.accept(self.novelty(self._z))
        return novel and (self.burning_in or self._loss > self.floor.floor)

    def stepped(self) -> None:
        """Moves the floor, too."""
        super().stepped()
        self.floor.step(self._loss)

    def metrics(self) -> dict[str, float]:
        """Both."""
        return {**super().metrics(), "loss_floor": self.floor.floor}

    def state_dict(self) -> dict[str, Any]:
        """With the floor."""
        return {**super().state_dict(), "floor": asdict(self.floor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """With the floor."""
        super().load_state_dict(state)
        self.floor.load(state["floor"])

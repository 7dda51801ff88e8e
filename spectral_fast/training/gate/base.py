"""What every gate has: a decision per micro-batch, counters, and a state to go on from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Mean = Callable[[Tensor], Tensor]


def alone(x: Tensor) -> Tensor:
    """The mean over ranks where there is one."""
    return x


class Gate(ABC):
    """Decides for each micro-batch, from its forward pass alone, whether its gradient is worth a backward pass.

    Per micro-batch: `decide`; if it said so, the backward pass and `accepted`; then `stepped` in any case. All ranks of
    a distributed run that start from one seed and are given the same means decide the same.

    Attributes:
        target: share of micro-batches to accept after the burn-in.
        burn_in: how many are accepted before any decision is taken.
        seed: of the random decisions.
        step_count: micro-batches so far.
        accepted_count: those that were accepted.
    """

    def __init__(self, target: float, burn_in: int, seed: int) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"the share to accept, target_novelty, must be in (0, 1]; got {target}")
        if burn_in < 0:
            raise ValueError(f"burn_in must be >= 0; got {burn_in}")
        self.target, self.burn_in, self.seed = float(target), int(burn_in), int(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.step_count = self.accepted_count = 0

    @abstractmethod
    def decide(self, loss: float, hidden: Tensor, logits: Tensor, labels: Tensor, mean: Mean = alone) -> bool:
        """Whether this micro-batch is accepted; its gradient is not taken in yet, `accepted` does that.

        Args:
            loss: its mean over the tokens; NaN if none has a label.
            hidden: what enters the output embedding, (batch, tokens, d_hidden).
            logits: what leaves it, (batch, tokens, vocab_size); or, where logits are not formed, its weight
                (vocab_size, d_hidden).
            labels: (batch, tokens), -100 where there is none.
            mean: of a small tensor over the ranks.
        """

    def accepted(self) -> None:
        """The micro-batch that was decided on has given its gradient."""
        self.accepted_count += 1

    def stepped(self) -> None:
        """The micro-batch that was decided on is over."""
        self.step_count += 1

    def acceptance_rate(self) -> float:
        """Share of all micro-batches that were accepted, the burn-in included; 1 before the first."""
        return self.accepted_count / self.step_count if self.step_count else 1.0

    def metrics(self) -> dict[str, float]:
        """What is logged of the last micro-batch, beside the counters."""
        return {}

    @property
    def burning_in(self) -> bool:
        """Whether all is accepted still."""
        return self.step_count < self.burn_in

    def _draw(self) -> float:
        """A random number in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as `torch.load(weights_only=True)` reads it."""
        return {
            "kind": type(self).__name__,
            "generator": self.generator.get_state(),
            "step_count": self.step_count,
            "accepted_count": self.accepted_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the gate that gave it.

        Raises:
            ValueError: it is of another kind of gate, or of other sizes.
        """
        if state["kind"] != type(self).__name__:
            raise ValueError(f"the state is of a {state['kind']}, this gate is a {type(self).__name__}")
        self.generator.set_state(state["generator"])
        self.step_count, self.accepted_count = int(state["step_count"]), int(state["accepted_count"])


class RandomControl(Gate):
    """Accepts at random: what a gate that knows nothing reaches by skipping as much."""

    def __init__(self, target: float, burn_in: int = 0, seed: int = 0) -> None:
        super().__init__(target, burn_in, seed)

    def decide(self, loss: float, hidden: Tensor, logits: Tensor, labels: Tensor, mean: Mean = alone) -> bool:  # noqa: ARG002
        """A draw."""
        return self.burning_in or self._draw() < self.target

"""What a gate compares with, moved so that a wanted share is accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

DECAY = 0.95  # of the acceptance rate's moving average


@dataclass
class Threshold:
    """tau += rate (r − target), kept within [0, 1], for r the moving average of what was accepted, of decay 0.95.

    So sigmoid(beta (novelty − 1)) is the least share that can be accepted: one half, if all is new throughout. A stream
    that stays there wants more directions or a longer burn-in.

    Attributes:
        target: share to accept.
        rate: of the steps of tau.
        tau: the threshold; it begins at the target.
        accepted: r; it begins at the target, too.
    """

    target: float
    rate: float
    tau: float = field(init=False)
    accepted: float = field(init=False)

    def __post_init__(self) -> None:
        self.tau = self.accepted = self.target

    def step(self, accepted: bool, overall: float) -> None:  # noqa: ARG002
        """A micro-batch was accepted or not; `overall` is the share of all so far."""
        self.accepted += (1 - DECAY) * (accepted - self.accepted)
        self.tau = min(max(self.tau + self.rate * (self.accepted - self.target), 0.0), 1.0)


@dataclass
class SourceThreshold(Threshold):
    """tau += rate (target − share of all accepted): the original's sign, by which too much accepted lowers tau."""

    def step(self, accepted: bool, overall: float) -> None:
        """As above; nothing is clamped."""
        self.accepted += (1 - DECAY) * (accepted - self.accepted)
        self.tau += self.rate * (self.target - overall)


@dataclass
class LossFloor:
    """A quantile of a stream of losses that falls while it is watched: level + offset · spread.

    Level and spread are moving averages of the loss and of its distance from the level; the offset, which begins at the
    normal distribution's, goes down by rate · (1 − quantile) whenever a loss is below the floor, and else up by
    rate · quantile, so that in the long run a share `quantile` lies below.

    Attributes:
        quantile: share of losses below the floor, within (0, 1).
        rate: of all three moving averages.
    """

    quantile: float
    rate: float = 0.05
    level: float = math.nan
    spread: float = 0.0
    offset: float = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"a loss floor wants a quantile within (0, 1); got {self.quantile}")
        self.offset = NormalDist().inv_cdf(self.quantile) * math.sqrt(math.pi / 2)

    @property
    def floor(self) -> float:
        """The quantile; NaN, which nothing is above of, before the first loss."""
        return self.level + self.offset * self.spread

    def step(self, loss: float) -> None:
        """Take a loss in; one that is not finite is left out."""
        if not math.isfinite(loss):
            return
        if math.isnan(self.level):
            self.level = loss
            return
        self.offset += self.rate * (self.quantile - (loss <= self.floor))
        self.spread += self.rate * (abs(loss - self.level) - self.spread)
        self.level += self.rate * (loss - self.level)

    def load(self, state: dict[str, float]) -> None:
        """Go on from level, spread and offset of another."""
        self.level, self.spread, self.offset = (float(state[name]) for name in ("level", "spread", "offset"))

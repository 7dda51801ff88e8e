"""What the tools may be told."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from spectral_fast.options import check, option

if TYPE_CHECKING:
    from torch import Tensor

    from spectral_fast.sensitivity import Sensitivity


@dataclass(frozen=True)
class ResizeOptions:
    """How many directions of every module are kept; one of the first five.

    Example:
        >>> from spectral_fast.toolbox import ResizeOptions
        >>> ResizeOptions(rank=16).rank
        16
        >>> ResizeOptions(rank=16, energy=0.9)
        Traceback (most recent call last):
            ...
        ValueError: give one of rank, energy, error, budget and budget_params; got rank=16, energy=0.9
    """

    rank: int | None = option(None, "rank of every module; those of a smaller one keep theirs", low=1)
    energy: float | None = option(None, "smallest ranks that keep this share of each module's sum of s²", low=0, high=1)
    error: float | None = option(
        None, "smallest ranks with |ΔW - ΔW'| / |ΔW| up to this in each module, Frobenius norms", low=0, high=1
    )
    budget: float | None = option(
        None, "drop directions of least |s g| with up to this share of its sum over all modules", low=0, high=1
    )
    budget_params: int | None = option(
        None, "drop directions of least |s g| until the modules have at most this many parameters", low=1
    )
    pad: bool = option(False, "give all modules the largest rank (or --rank), by zeros: no rank_pattern is needed")

    def __post_init__(self) -> None:
        check(self)
        goals = {name: value for name, value in asdict(self).items() if name != "pad" and value is not None}
        if len(goals) != 1:
            raise ValueError(
                "give one of rank, energy, error, budget and budget_params; got "
                f"{', '.join(f'{name}={value}' for name, value in goals.items()) or 'none'}"
            )

    def check_sensitivity(self, sensitivity: Sensitivity | None) -> None:
        """Refuse sensitivities that would not be used, and budgets without them."""
        if sensitivity is None and (self.budget is not None or self.budget_params is not None):
            raise ValueError("a budget is spent by sensitivities: probe the adapter, and give what probe wrote")
        if sensitivity is not None and (self.energy is not None or self.error is not None):
            raise ValueError("energy and error go by singular values alone; with sensitivities give rank or a budget")


@dataclass(frozen=True)
class ClipOptions:
    """What a spike is.

    Example:
        >>> from spectral_fast.toolbox import ClipOptions
        >>> ClipOptions(multiple=10.0).multiple
        10.0
    """

    multiple: float = option(
        10.0, "clip singular values above this many times the median of the module's that are not zero", low=1
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class InspectOptions:
    """What is worth a remark.

    Example:
        >>> from spectral_fast.toolbox import InspectOptions
        >>> InspectOptions(spike=5.0).spike
        5.0
    """

    spike: float = option(10.0, "remark on singular values above this many times the median that are not zero", low=1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PruneOptions:
    """Which channels of every module are kept.

    Example:
        >>> from spectral_fast.toolbox import PruneOptions
        >>> PruneOptions(keep_ratio=0.5).keep(32)  # channels of a module of rank 32
        16
    """

    method: str = option(
        "channel_energy",
        "score of channel k: |b_k|^2 |a_k|^2, |b_k|^2, or drawn at random",
        choices=("channel_energy", "magnitude_B", "random"),
    )
    keep_ratio: float = option(0.5, "share of a module's channels that is kept, rounded up", low=0.0, high=1.0)
    seed: int = option(0, "seed of the random method")

    def __post_init__(self) -> None:
        check(self)

    def keep(self, r: int) -> int:
        """How many of r channels are kept: max(1, min(r, ⌈keep_ratio r⌉))."""
        return max(1, min(r, math.ceil(self.keep_ratio * r)))

    def scorer(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The score as a function of B (m, r) and A (r, n), giving (r,) float64 on the CPU.

        For `random` it draws from one stream: the result depends on the order of its calls, and on r alone.
        """
        from spectral_fast.toolbox.measures import channel_energy, energy

        if self.method == "random":
            import torch

            draw = random.Random(self.seed).random
            return lambda b, _: torch.tensor([draw() for _ in range(b.shape[1])], dtype=torch.float64)
        if self.method == "magnitude_B":
            return lambda b, _: energy(b, 0)
        return channel_energy

    def kept(self, scores: Tensor) -> Tensor:
        """(r,) bool: the channels with the highest scores."""
        import torch

        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[scores.topk(self.keep(len(scores))).indices] = True
        return mask

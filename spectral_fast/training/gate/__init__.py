"""Gates of a training: which micro-batches are worth a backward pass, told from their forward pass.

`HeadGradientGate` by the novelty of the gradient; `LossFloorGate`, `NoveltyAndLossGate` and `RandomControl` to compare
it with. `open_gate` makes one by its name.
"""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.training.gate.base import Gate, RandomControl
    from spectral_fast.training.gate.controllers import LossFloor, SourceThreshold, Threshold
    from spectral_fast.training.gate.frequent_directions import FrequentDirections
    from spectral_fast.training.gate.head_gradient import HeadGradientGate
    from spectral_fast.training.gate.loss_floor import LossFloorGate, NoveltyAndLossGate
    from spectral_fast.training.gate.names import KINDS
    from spectral_fast.training.gate.opening import open_gate
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "spectral_fast.training.gate.base": ("Gate", "RandomControl"),
            "spectral_fast.training.gate.controllers": ("LossFloor", "SourceThreshold", "Threshold"),
            "spectral_fast.training.gate.frequent_directions": ("FrequentDirections",),
            "spectral_fast.training.gate.head_gradient": ("HeadGradientGate",),
            "spectral_fast.training.gate.loss_floor": ("LossFloorGate", "NoveltyAndLossGate"),
            "spectral_fast.training.gate.names": ("KINDS",),
            "spectral_fast.training.gate.opening": ("open_gate",),
        },
    )

__all__ = [
    "KINDS",
    "FrequentDirections",
    "Gate",
    "HeadGradientGate",
    "LossFloor",
    "LossFloorGate",
    "NoveltyAndLossGate",
    "RandomControl",
    "SourceThreshold",
    "Threshold",
    "open_gate",
]

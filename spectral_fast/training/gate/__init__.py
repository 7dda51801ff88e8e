"""Gates of a training: which micro-batches are worth a backward pass, told from their forward pass.

`HeadGradientGate` by the novelty of the gradient; `LossFloorGate`, `NoveltyAndLossGate` and `RandomControl` to compare
it with. `open_gate` makes one by its name.
"""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.training.gate.base import Gate as Gate
    from spectral_fast.training.gate.base import RandomControl as RandomControl
    from spectral_fast.training.gate.controllers import LossFloor as LossFloor
    from spectral_fast.training.gate.controllers import SourceThreshold as SourceThreshold
    from spectral_fast.training.gate.controllers import Threshold as Threshold
    from spectral_fast.training.gate.frequent_directions import FrequentDirections as FrequentDirections
    from spectral_fast.training.gate.head_gradient import HeadGradientGate as HeadGradientGate
    from spectral_fast.training.gate.loss_floor import LossFloorGate as LossFloorGate
    from spectral_fast.training.gate.loss_floor import NoveltyAndLossGate as NoveltyAndLossGate
    from spectral_fast.training.gate.names import KINDS as KINDS
    from spectral_fast.training.gate.opening import open_gate as open_gate
else:
    __getattr__, __dir__, __all__ = lazily(
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

"""Training LoRA adapters by TRL's SFTTrainer, from a YAML file: `load` reads the settings, `train` does it.

`HeadGradientGate` tells which micro-batches of a training are worth a backward pass; `gated` makes a trainer of
transformers that asks it, and `GatedTrainer` and `GatedSFTTrainer` are two of those.
"""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.training.gate.head_gradient import HeadGradientGate as HeadGradientGate
    from spectral_fast.training.run import train as train
    from spectral_fast.training.settings import Settings as Settings
    from spectral_fast.training.settings import load as load
    from spectral_fast.training.trainer import GatedSFTTrainer as GatedSFTTrainer
    from spectral_fast.training.trainer import GatedTrainer as GatedTrainer
    from spectral_fast.training.trainer import gated as gated
else:
    __getattr__, __dir__, __all__ = lazily(
        __name__,
        {
            "spectral_fast.training.gate.head_gradient": ("HeadGradientGate",),
            "spectral_fast.training.run": ("train",),
            "spectral_fast.training.settings": ("Settings", "load"),
            "spectral_fast.training.trainer": ("GatedSFTTrainer", "GatedTrainer", "gated"),
        },
    )

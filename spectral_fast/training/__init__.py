"""Training LoRA adapters by TRL's SFTTrainer, from a YAML file: `load` reads the settings, `train` does it.

`HeadGradientGate` tells which micro-batches of a training are worth a backward pass; `gated` makes a trainer of
transformers that asks it, and `GatedTrainer` and `GatedSFTTrainer` are two of those.
"""

from typing import Any

from spectral_fast.training.gate import HeadGradientGate
from spectral_fast.training.run import train
from spectral_fast.training.settings import Settings, load

__all__ = ["GatedSFTTrainer", "GatedTrainer", "HeadGradientGate", "Settings", "gated", "load", "train"]


def __getattr__(name: str) -> Any:
    """The trainers, for which transformers and TRL are imported."""
    if name not in ("gated", "GatedTrainer", "GatedSFTTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spectral_fast.training.trainer import gated

    if name == "gated":
        return gated
    if name == "GatedTrainer":
        from transformers import Trainer

        return gated(Trainer)
    from trl import SFTTrainer

    return gated(SFTTrainer)

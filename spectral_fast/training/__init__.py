"""Training LoRA adapters by TRL's SFTTrainer, from a YAML file: `load` reads the settings, `train` does it.

`HeadGradientGate` tells which micro-batches of a training are worth a backward pass.
"""

from spectral_fast.training.gate import HeadGradientGate
from spectral_fast.training.run import train
from spectral_fast.training.settings import Settings, load

__all__ = ["HeadGradientGate", "Settings", "load", "train"]

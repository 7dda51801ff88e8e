"""Training LoRA adapters by TRL's SFTTrainer, from a YAML file: `load` reads the settings, `train` does it."""

from spectral_fast.training.run import train
from spectral_fast.training.settings import Settings, load

__all__ = ["Settings", "load", "train"]

"""LS-LoRA in PEFT: LoRA with a learned spline after it. Importing this makes PEFT know the method."""

from spectral_fast.lslora.config import LSLoraConfig
from spectral_fast.lslora.layer import SplineLayer
from spectral_fast.lslora.model import LSLoraModel, register, spline_parameters, spline_penalty, splines_of
from spectral_fast.splines import PRESETS, Spline, SplineOptions, read_splines

register()

__all__ = [
    "PRESETS",
    "LSLoraConfig",
    "LSLoraModel",
    "Spline",
    "SplineLayer",
    "SplineOptions",
    "read_splines",
    "spline_parameters",
    "spline_penalty",
    "splines_of",
]

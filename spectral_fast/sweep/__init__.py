"""Sweeps: many edits of adapters, made from one probe each, evaluated together, compared as statistics demand."""

from spectral_fast.sweep.config import Config, load_configs
from spectral_fast.sweep.run import run_sweep
from spectral_fast.sweep.work import Settings

__all__ = ["Config", "Settings", "load_configs", "run_sweep"]

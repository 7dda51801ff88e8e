"""A small trained model, its LoRA adapter and their problems: the default that needs no download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["adapter_dir", "base_model_dir", "calibration_file", "heldout_file"]


def base_model_dir() -> Path:
    """Directory of the base model: a Llama of 3.2 million parameters that solves one-step problems."""
    return _asset("base_model")


def adapter_dir() -> Path:
    """Directory of the PEFT LoRA adapter (r = 32) that makes the base model solve two-step problems."""
    return _asset("adapter")


def calibration_file() -> Path:
    """JSON lines of question and answer: the first 256 two-step problems the adapter was trained on."""
    return _asset("calibration.jsonl")


def heldout_file() -> Path:
    """JSON lines of question and answer: 512 held-out two-step problems."""
    return _asset("heldout.jsonl")


def _asset(name: str) -> Path:
    path = Path(str(files(__name__))) / "assets" / name
    if not path.exists():
        raise FileNotFoundError(
            f"the embedded default needs {path}; got no such path; reinstall spectral_fast with its package "
            "data, or make the assets anew: python -m spectral_fast.embedded.make --out_dir DIR"
        )
    return path

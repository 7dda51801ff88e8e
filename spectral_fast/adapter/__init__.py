"""PEFT LoRA adapters on disk: factors out, factors in. Only this package knows PEFT's file and key names."""

from spectral_fast.adapter.folder import Adapter
from spectral_fast.adapter.hub import resolve
from spectral_fast.adapter.naming import LoraModule, changes_base

__all__ = ["Adapter", "LoraModule", "changes_base", "resolve"]

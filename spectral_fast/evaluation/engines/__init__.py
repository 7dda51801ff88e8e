"""Engines: one interface to generate texts by a base model with adapters, on transformers or on vLLM."""

from spectral_fast.evaluation.engines.opening import open_engine
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.evaluation.engines.protocol import Engine, Progress, Sampling

__all__ = ["Engine", "EngineOptions", "Progress", "Sampling", "open_engine"]

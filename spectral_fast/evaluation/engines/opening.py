"""The engine that the options ask for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spectral_fast.calibration.options import ModelOptions
from spectral_fast.evaluation.engines.options import EngineOptions
from spectral_fast.evaluation.engines.protocol import Engine


def open_engine(
    base_model: str, model_options: ModelOptions, options: EngineOptions, adapters: Iterable[Path | None] = ()
) -> Engine:
    """Start the engine of the options; to be closed, best by `with`.

    Args:
        base_model: folder or hub name.
        model_options: device, dtype and source of the base model.
        options: which engine, and its settings.
        adapters: those that will be asked for, or others of the same ranks: vLLM sets room aside for them.

    Raises:
        RuntimeError: the engine is not installed.
        FileNotFoundError: the model or an adapter is missing.
        ValueError: the engine cannot serve an adapter, or the model not on this device or in these bits.
    """
    if options.chosen() == "vllm":
        for name in ("load_in_4bit", "device_map"):
            if getattr(model_options, name) not in (False, "none"):
                raise ValueError(f"--{name} is for --engine transformers, and the engine is vllm: choose one")
        from spectral_fast.evaluation.engines.vllm import VllmEngine

        return VllmEngine(base_model, model_options, options, [adapter for adapter in adapters if adapter is not None])
    from spectral_fast.evaluation.engines.transformers import TransformersEngine

    return TransformersEngine(
        base_model, model_options, batch_size=options.batch_size, max_model_len=options.max_model_len
    )

"""Which engine, and how it is set up; what is left out is derived from the adapters and the machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from spectral_fast.calibration.model import ModelOptions
from spectral_fast.evaluation.engines.protocol import Engine
from spectral_fast.options import check, option

ENGINES = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class EngineOptions:
    """Which engine generates, and how much it may take."""

    engine: str = option("auto", "what generates; auto takes vllm where it is installed", choices=ENGINES)
    batch_size: int = option(32, "texts that run together (transformers)", low=1)
    max_model_len: int = option(4096, "most tokens of prompt and answer together", low=1)
    max_loras: int | None = option(None, "adapters that run together (vllm); else all, at most 8", low=1)
    max_lora_rank: int | None = option(None, "largest rank that is served (vllm); else that of the adapters", low=1)
    gpu_memory_utilization: float | None = option(
        None,
        "share of a GPU's memory (vllm); else $VLLM_GPU_MEMORY_UTILIZATION, else vLLM's own",
        high=1.0,
        positive=True,
    )
    enforce_eager: bool = option(False, "capture no CUDA graphs and compile nothing (vllm); $VLLM_ENFORCE_EAGER=1, too")

    def __post_init__(self) -> None:
        check(self)

    def chosen(self) -> str:
        """The engine's name: auto is vllm where it is installed, else transformers."""
        if self.engine != "auto":
            return self.engine
        found = find_spec("vllm")
        return "vllm" if found is not None and found.origin is not None else "transformers"  # not any folder vllm/


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

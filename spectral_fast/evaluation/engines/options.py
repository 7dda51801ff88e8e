"""Which engine, and how it is set up; what is left out is derived from the adapters and the machine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from spectral_fast.options import check, option

ENGINES = ("auto", "vllm", "transformers")
VLLM_ONLY = ("max_loras", "max_lora_rank", "gpu_memory_utilization", "enforce_eager")
TRANSFORMERS_ONLY = ("batch_size",)


@dataclass(frozen=True)
class EngineOptions:
    """Which engine generates, and how much it may take.

    Example:
        >>> from spectral_fast.evaluation import EngineOptions
        >>> EngineOptions(engine="transformers", batch_size=64).chosen()
        'transformers'
    """

    engine: str = option("auto", "what generates; auto takes vllm where it is installed", choices=ENGINES)
    batch_size: int = option(32, "texts that run together, with transformers", low=1)
    max_model_len: int = option(4096, "most tokens of prompt and answer together", low=1)
    max_loras: int | None = option(None, "adapters that run together, with vllm", low=1, shown="all, at most 8")
    max_lora_rank: int | None = option(None, "largest rank that vllm serves", low=1, shown="that of the adapters")
    gpu_memory_utilization: float | None = option(
        None,
        "share of a GPU's memory that vllm takes",
        high=1.0,
        positive=True,
        shown="$VLLM_GPU_MEMORY_UTILIZATION, else vLLM's own",
    )
    enforce_eager: bool = option(
        False, "let vllm capture no CUDA graphs and compile nothing; $VLLM_ENFORCE_EAGER=1, too"
    )

    def __post_init__(self) -> None:
        check(self)

    def chosen(self) -> str:
        """The engine's name: auto is vllm where it is installed, else transformers."""
        if self.engine != "auto":
            return self.engine
        found = find_spec("vllm")
        return "vllm" if found is not None and found.origin is not None else "transformers"  # not any folder vllm/

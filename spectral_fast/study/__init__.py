"""The SVD study: how well do cheap scores find what matters in a weight, an adapter, an activation?

`run_toy` and `run_predictors` reconstruct random and real weights from a part of them, `run_prune_finetune` prunes the
channels of a LoRA between two phases of training, `run_active_channels` predicts which channels of a layer are active.

Inspired by Khaki et al., "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", arXiv:2506.16500.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectral_fast.study.options import ActiveChannelOptions, PredictorOptions, PruneFinetuneOptions, ToyOptions

if TYPE_CHECKING:
    from spectral_fast.study.active_channels import run_active_channels
    from spectral_fast.study.predictors import run_predictors
    from spectral_fast.study.prune_finetune import run_prune_finetune
    from spectral_fast.study.toy import run_toy

__all__ = [
    "ActiveChannelOptions",
    "PredictorOptions",
    "PruneFinetuneOptions",
    "ToyOptions",
    "run_active_channels",
    "run_predictors",
    "run_prune_finetune",
    "run_toy",
]


def __getattr__(name: str) -> Any:
    """The functions, for which matplotlib and transformers are imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.removeprefix('run_')}"), name)

"""The SVD study: how well do cheap scores find what matters in a weight, an adapter, an activation?

`run_toy` and `run_predictors` reconstruct random and real weights from a part of them, `run_prune_finetune` prunes the
channels of a LoRA between two phases of training, `run_active_channels` predicts which channels of a layer are active.

Inspired by Khaki et al., "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", arXiv:2506.16500.
"""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.study.active_channels import run_active_channels
    from spectral_fast.study.options import ActiveChannelOptions, PredictorOptions, PruneFinetuneOptions, ToyOptions
    from spectral_fast.study.predictors import run_predictors
    from spectral_fast.study.prune_finetune import run_prune_finetune
    from spectral_fast.study.toy import run_toy
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "spectral_fast.study.active_channels": ("run_active_channels",),
            "spectral_fast.study.options": (
                "ActiveChannelOptions",
                "PredictorOptions",
                "PruneFinetuneOptions",
                "ToyOptions",
            ),
            "spectral_fast.study.predictors": ("run_predictors",),
            "spectral_fast.study.prune_finetune": ("run_prune_finetune",),
            "spectral_fast.study.toy": ("run_toy",),
        },
    )

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

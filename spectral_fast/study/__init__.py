"""The SVD study: how well do cheap scores find what matters in a weight, an adapter, an activation?

`run_toy` and `run_predictors` reconstruct random and real weights from a part of them, `run_prune_finetune` prunes the
channels of a LoRA between two phases of training, `run_active_channels` predicts which channels of a layer are active.

Inspired by Khaki et al., "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", arXiv:2506.16500.
"""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.study.active_channels import run_active_channels as run_active_channels
    from spectral_fast.study.options import ActiveChannelOptions as ActiveChannelOptions
    from spectral_fast.study.options import PredictorOptions as PredictorOptions
    from spectral_fast.study.options import PruneFinetuneOptions as PruneFinetuneOptions
    from spectral_fast.study.options import ToyOptions as ToyOptions
    from spectral_fast.study.predictors import run_predictors as run_predictors
    from spectral_fast.study.prune_finetune import run_prune_finetune as run_prune_finetune
    from spectral_fast.study.toy import run_toy as run_toy
else:
    __getattr__, __dir__, __all__ = lazily(
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

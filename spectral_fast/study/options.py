"""Settings of the study's commands, which are also their flags."""

from __future__ import annotations

from dataclasses import dataclass

from spectral_fast.options import check, option
from spectral_fast.toolbox.options import PruneOptions


@dataclass(frozen=True)
class ToyOptions:
    """Sizes and number of the random matrices.

    Example:
        >>> from spectral_fast.study import ToyOptions
        >>> ToyOptions(ranks=(2, 4), trials=10).trials
        10
    """

    n: int = option(128, "rows", low=1)
    m: int = option(64, "columns", low=1)
    ranks: tuple[int, ...] = option((8, 16, 32), "ranks, and numbers of columns kept")
    trials: int = option(200, "matrices per rank", low=2)
    seed: int = option(0, "seed of all draws", low=0)

    def __post_init__(self) -> None:
        check(self)
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks must be one or more, each at least 1; got {' '.join(map(str, self.ranks))}")


@dataclass(frozen=True)
class PredictorOptions:
    """Which matrices of a model to inspect, and how much of each to keep.

    Example:
        >>> from spectral_fast.study import PredictorOptions
        >>> PredictorOptions(rank=16).rank
        16
    """

    rank: int = option(8, "triplets, columns or rows that are kept", low=1)
    run_experiment: bool = option(False, "draw one matrix beside its reconstructions")
    keep_ratio: float = option(0.3, "share of the triplets, columns or rows kept for that", low=0.0, high=1.0)
    experiment_param: str = option("", "the parameter for that", shown="the last one inspected")
    seed: int = option(0, "seed of the random triplets and factors", low=0)
    max_layers: int = option(200, "most two-dimensional parameters to look at", low=1)
    max_elems: int = option(10_000_000, "parameters with more elements are skipped", low=1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PruneFinetuneOptions(PruneOptions):
    """The LoRA, its pruning, and the two phases of training around it.

    Example:
        >>> from spectral_fast.study import PruneFinetuneOptions
        >>> PruneFinetuneOptions(keep_ratio=0.5, lora_r=8).keep(8)
        4
    """

    lora_r: int = option(8, "rank", low=1)
    lora_alpha: int = option(16, "alpha; the scaling is alpha / r", low=1)
    target_modules: str = option(
        "", "names of the linear layers, with commas", shown="those that the model has of a list"
    )
    warmup_epochs: float = option(1.0, "epochs before pruning", low=0.0)
    post_epochs: float = option(1.0, "epochs after it", low=0.0)
    train_samples: int = option(200, "training rows, drawn with the seed; 0 for all", low=0)
    eval_samples: int = option(200, "evaluation rows, drawn with the seed; 0 for all", low=0)
    train_bsz: int = option(16, "training rows per step", low=1)
    eval_bsz: int = option(32, "evaluation rows at a time", low=1)
    lr: float = option(2e-4, "learning rate, which falls to 0 in each phase", positive=True)
    weight_decay: float = option(0.0, "weight decay of AdamW, in both phases", low=0.0)
    keep_optimizer: bool = option(False, "go on after pruning with the moments of AdamW from before")
    text_column: str = option("sentence", "column with the text")
    label_column: str = option("label", "column with the class")


@dataclass(frozen=True)
class ActiveChannelOptions:
    """How active channels are predicted, and how many.

    Example:
        >>> from spectral_fast.study import ActiveChannelOptions
        >>> ActiveChannelOptions().keep(688, 0.9)  # of 688 channels, a tenth
        68
    """

    rank: int = option(8, "rank of the factors that predict", low=1)
    sparsity: tuple[float, ...] = option((0.5, 0.8, 0.9, 0.97), "shares of a layer's channels that are left out")
    context_only: bool = option(False, "count only tokens before the answer, those that SparseLoRA computes sparsely")
    seed: int = option(0, "seed of the random control", low=0)

    def __post_init__(self) -> None:
        check(self)
        if not self.sparsity or not all(0 <= share < 1 for share in self.sparsity):
            raise ValueError(f"sparsity must be one or more shares in [0, 1); got {self.sparsity}")

    def keep(self, channels: int, sparsity: float) -> int:
        """How many channels are computed: int(channels (1 - sparsity)), at least one."""
        return max(1, int(channels * (1 - sparsity)))

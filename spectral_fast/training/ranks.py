"""Ranks that the base model's spectra, or a sensitivity file, give: the settings of a training for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_fast.options import check, option, take
from spectral_fast.training.options import LoraModelConfig

HEAD = "lm_head"  # TRL's trainer computes the loss from its weight, past any adapter, and refuses one


@dataclass(frozen=True)
class RankAssignmentConfig:
    """How ranks are assigned."""

    adaptive_ranks: bool = option(False, "ranks by the spectra of the base weights, in place of lora_r and lora_alpha")
    rank_preset: str = option("paper", "paper, or what its source does", choices=("paper", "source"))
    top_n_percentile: float = option(0.5, "share of the layers to adapt", low=0.0, high=1.0)
    min_rank: int = option(4, "lowest rank", low=1)
    max_rank: int = option(64, "highest rank", low=1)
    rank_scaling: str = option("linear", "how ranks grow with scores", choices=("linear", "log", "sqrt"))
    alpha_factor: float = option(2.0, "alpha of a module over its rank", positive=True)
    w_hill: float = option(0.7, "weight of the tail exponent in the score", low=0.0)
    w_mp_spikes: float = option(0.3, "weight of the spikes in the score", low=0.0)
    budget_params: int | None = option(None, "parameters that the adapter shall have, met to 1 %", low=1)
    budget_uniform_rank: int | None = option(None, "or: as many as with this rank on all modules", low=1)
    sensitivity: str | None = option(None, "folder that `probe` wrote: ranks by it instead of by spectra")

    def __post_init__(self) -> None:
        check(self)
        if self.sensitivity is not None and not self.adaptive_ranks:
            raise ValueError("sensitivity is for adaptive_ranks, which is off; leave out one of the two")


def adaptive_lora(model: LoraModelConfig, ranks: RankAssignmentConfig) -> Any:
    """`allocation.AdaptiveLora` of the base model's files: of its weights before they are quantised.

    Raises:
        FileNotFoundError, ValueError: as `layers_of`, `Sensitivity.load` and `allocate`.
    """
    from spectral_fast.allocation import RankOptions, SpectralOptions, allocate, layers_of, preset_of
    from spectral_fast.sensitivity import Sensitivity

    given = {
        **preset_of(ranks.rank_preset),
        "layer_selection_percentile": ranks.top_n_percentile,
        "minimum_rank": ranks.min_rank,
        "maximum_rank": ranks.max_rank,
        "rank_scaling_method": ranks.rank_scaling,
        "alpha_scaling_factor": ranks.alpha_factor,
        "hill_weight": ranks.w_hill,
        "mp_spikes_weight": ranks.w_mp_spikes,
        "target_modules": () if model.adapts_all else model.lora_target_modules,
        "exclude_modules": (HEAD,),
        "budget_params": ranks.budget_params,
        "budget_uniform_rank": ranks.budget_uniform_rank,
    }
    return allocate(
        layers_of(model.name, model.loading()),
        take(RankOptions, given),
        take(SpectralOptions, given),
        sensitivity=None if ranks.sensitivity is None else Sensitivity.load(Path(ranks.sensitivity)),
    )

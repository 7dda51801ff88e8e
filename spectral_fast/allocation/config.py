"""Ranks for a model's layers as PEFT's LoraConfig takes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectral_fast.allocation.analysis import LayerSpectrum, as_table, spectra
from spectral_fast.allocation.layers import Layer, layers_of
from spectral_fast.allocation.options import RankOptions, SpectralOptions, preset_of
from spectral_fast.allocation.ranks import (
    budget_of,
    normalised,
    ranks_of,
    select,
    sensitivity_scores,
    spectral_scores,
)
from spectral_fast.options import take
from spectral_fast.sensitivity import Sensitivity


@dataclass(frozen=True, eq=False)
class AdaptiveLora:
    """Ranks of the layers that are adapted.

    Attributes:
        rank_pattern: key of a module -> its rank, see `pattern_keys`.
        alpha_pattern: key of a module -> its lora_alpha.
        target_modules: regular expression that fits the full names of the adapted modules, and nothing else.
        r: the largest rank: what loaders that read no patterns must be ready for.
        lora_alpha: of that rank.
        parameters: of the adapter; magnitudes of DoRA come on top.
        table: pandas.DataFrame, a row per layer, in the model's order; rank_pattern is 0 where there is no adapter.
        found: the spectra; empty if the ranks are from sensitivities.
    """

    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str
    r: int
    lora_alpha: float
    parameters: int
    table: Any
    found: Sequence[LayerSpectrum]

    def fields(self) -> dict[str, Any]:
        """Those of LoraConfig, as they go into JSON."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }

    def lora_config(self, **options: Any) -> Any:
        """A `peft.LoraConfig` with these ranks; options such as use_rslora, use_dora or task_type go with it.

        With use_rslora PEFT scales an update by lora_alpha / sqrt(r), which is alpha_scaling_factor · sqrt(r) here.
        """
        from peft import LoraConfig

        return LoraConfig(**self.fields(), **options)


def spectral_analysis_for_adaptive_lora(
    model: Any,
    eigenvalue_threshold: float = 1e-5,
    histogram_bins: int = 100,
    power_law_fitting_method: str | None = None,
    xmin_position: int = 2,
    conv_normalization: float = 0.5,
    filter_near_zero_eigenvalues: bool = False,
    apply_tracy_widom_correction: bool = True,
    *,
    preset: str = "paper",
) -> Any:
    """Table of the spectra of every `nn.Linear` and `nn.Conv2d` of a model.

    Args:
        model: a model in memory, or the folder or name of one, whose weights are then read one matrix after the other.
        eigenvalue_threshold: what counts as near zero.
        histogram_bins: of "fix-finger".
        power_law_fitting_method: "median", "goodness-of-fit" or "fix-finger"; None for the preset's own.
        xmin_position: of "median".
        conv_normalization: factor of the eigenvalues of convolutions.
        filter_near_zero_eigenvalues: leave out eigenvalues near zero, if any other is left.
        apply_tracy_widom_correction: of the bulk's edge.
        preset: "paper" or "source", see `PRESETS`.

    Returns:
        pandas.DataFrame, a row per layer: layer_index, alpha_hill, spectral_norm (the largest eigenvalue), D,
        layer_name, eigs, norm (their sum), alphahat, num_spikes; then what `LayerSpectrum.row` adds.

    Example:
        >>> from spectral_fast import embedded
        >>> from spectral_fast.allocation import spectral_analysis_for_adaptive_lora
        >>> table = spectral_analysis_for_adaptive_lora(embedded.base_model_dir())
        >>> len(table), table.layer_name[0]
        (29, 'model.layers.0.self_attn.q_proj')
    """
    given: dict[str, Any] = {
        "eigenvalue_threshold": eigenvalue_threshold,
        "histogram_bins": histogram_bins,
        "xmin_position": xmin_position,
        "conv_normalization": conv_normalization,
        "filter_near_zero_eigenvalues": filter_near_zero_eigenvalues,
        "apply_tracy_widom_correction": apply_tracy_widom_correction,
    }
    if power_law_fitting_method is not None:
        given["power_law_fitting_method"] = power_law_fitting_method
    return as_table(spectra(layers_of(model), take(SpectralOptions, {**preset_of(preset), **given})))


def compute_adaptive_lora_ranks(
    model: Any,
    layer_selection_percentile: float = 0.5,
    minimum_rank: int = 4,
    maximum_rank: int = 64,
    rank_scaling_method: str = "linear",
    alpha_scaling_factor: float = 2,
    hill_weight: float = 0.7,
    mp_spikes_weight: float = 0.3,
    *,
    preset: str = "paper",
) -> Any:
    """What `get_adaptive_lora_config` finds, as a pandas.DataFrame with a row per adapted layer, in the model's order.

    Its columns are those of `spectral_analysis_for_adaptive_lora`, alpha_hill_normalized, num_spikes_normalized,
    weighted_score, rank_pattern and alpha_pattern.
    """
    table = get_adaptive_lora_config(
        model,
        layer_selection_percentile,
        minimum_rank,
        maximum_rank,
        rank_scaling_method,
        alpha_scaling_factor,
        hill_weight,
        mp_spikes_weight,
        preset=preset,
    ).table
    return table[table.rank_pattern > 0].reset_index(drop=True)


def get_adaptive_lora_config(
    model: Any,
    layer_selection_percentile: float = 0.5,
    minimum_rank: int = 4,
    maximum_rank: int = 64,
    rank_scaling_method: str = "linear",
    alpha_scaling_factor: float = 2,
    hill_weight: float = 0.7,
    mp_spikes_weight: float = 0.3,
    *,
    preset: str = "paper",
    select: str | None = None,
    target_modules: Sequence[str] = (),
    exclude_modules: Sequence[str] = (),
    budget_params: int | None = None,
    budget_uniform_rank: int | None = None,
    spectral: SpectralOptions | None = None,
    sensitivity: Sensitivity | Path | str | None = None,
    device: torch.device | str | None = None,
) -> AdaptiveLora:
    """Ranks, alphas and target modules for LoRA on a model, by the spectra of its weights or by sensitivities.

    Args:
        model: a model in memory, or the folder or name of one, whose weights are then read one matrix after the other.
        layer_selection_percentile: share of the layers that are adapted.
        minimum_rank: of the lowest score that is selected.
        maximum_rank: of the highest.
        rank_scaling_method: "linear", "log" or "sqrt".
        alpha_scaling_factor: lora_alpha of a module over its rank.
        hill_weight: of the tail exponent in the score.
        mp_spikes_weight: of the spikes.
        preset: "paper": median Hill estimator, highest scores; "source": Kolmogorov-Smirnov search, lowest scores.
        select: "largest" or "smallest" scores; None for the preset's own.
        target_modules: last name components of the layers to choose among; all if empty.
        exclude_modules: last name components that are left out, e.g. lm_head.
        budget_params: parameters that the adapter shall have, met to 1 %.
        budget_uniform_rank: or: as many as with this rank on every layer there is to choose among.
        spectral: how spectra are read, in place of the preset's.
        sensitivity: what `probe` wrote or gave; the ranks are then by how much the directions of each module matter
            (`sensitivity_scores`), the layers to choose among are those that were probed, and no spectra are taken.
        device: where spectra are computed.

    Returns:
        Ranks and alphas by module, as `lora_config` hands them to PEFT, and the table of all layers.

    Raises:
        ValueError: no layer is selected, the budget cannot be met, or a preset is given with sensitivities.

    Example:
        >>> from spectral_fast import embedded, get_adaptive_lora_config
        >>> base = embedded.base_model_dir()
        >>> ranks = get_adaptive_lora_config(base, budget_uniform_rank=8, exclude_modules=["lm_head"])
        >>> len(ranks.rank_pattern), min(ranks.rank_pattern.values()) >= 4
        (14, True)
        >>> ranks.lora_config(task_type="CAUSAL_LM").peft_type.value
        'LORA'
    """
    if sensitivity is not None and preset != "paper":
        raise ValueError(f"preset {preset!r} is about spectra, and with sensitivity none are taken: leave out one")
    given: dict[str, Any] = {
        "layer_selection_percentile": layer_selection_percentile,
        "minimum_rank": minimum_rank,
        "maximum_rank": maximum_rank,
        "rank_scaling_method": rank_scaling_method,
        "alpha_scaling_factor": alpha_scaling_factor,
        "hill_weight": hill_weight,
        "mp_spikes_weight": mp_spikes_weight,
        "target_modules": tuple(target_modules),
        "exclude_modules": tuple(exclude_modules),
        "budget_params": budget_params,
        "budget_uniform_rank": budget_uniform_rank,
    }
    if select is not None:
        given["select"] = select
    options = take(RankOptions, {**preset_of(preset), **given})
    spectral = spectral or take(SpectralOptions, preset_of(preset))
    if isinstance(sensitivity, (str, Path)):
        sensitivity = Sensitivity.load(sensitivity)
    return allocate(layers_of(model), options, spectral, sensitivity=sensitivity, device=device)


def allocate(
    layers: Sequence[Layer],
    options: RankOptions,
    spectral: SpectralOptions,
    *,
    sensitivity: Sensitivity | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> AdaptiveLora:
    """`get_adaptive_lora_config` for layers from `layers_of` and options as dataclasses.

    Raises:
        ValueError: no layer is selected, or the budget cannot be met.
    """
    wanted = options.wanted(layers)
    if sensitivity is None:
        found = spectra(wanted, spectral, device, progress)
        table = as_table(found)
        # PEFT wants the rank of a grouped convolution to be a multiple of its groups: such layers are only analysed.
        chosen = [i for i, x in enumerate(found) if x.tail is not None and x.layer.groups == 1]
        _require(chosen, f"none of {len(wanted)} layers has {spectral.minimum_eigenvalues} eigenvalues and no groups")
        alphas, spikes = (table[name].to_numpy(np.float64)[chosen] for name in ("alpha_hill", "num_spikes"))
        columns = spectral_scores(alphas, spikes, options)
    else:
        found = []
        measured = sensitivity_scores(sensitivity)
        if unknown := sorted(measured.keys() - {layer.name for layer in layers}):
            raise ValueError(f"{unknown[0]} was probed, but is no linear layer or convolution of this model")
        table = _plain_table(wanted)
        chosen = [i for i, layer in enumerate(wanted) if layer.name in measured and layer.groups == 1]
        _require(chosen, f"none of {len(wanted)} layers was probed")
        columns = {
            name: np.array([measured[wanted[i].name][name] for i in chosen]) for name in ("sensitivity", "directions")
        }
        columns["weighted_score"] = normalised(columns["sensitivity"])
    scores = columns["weighted_score"]
    picked = select(scores, options)
    adapted = [wanted[chosen[i]] for i in picked]
    budget = budget_of([wanted[i] for i in chosen], options)
    ranks = ranks_of(scores[picked], [layer.cost for layer in adapted], options, budget)
    alphas = [_whole(rank * options.alpha_scaling_factor) for rank in ranks]
    for name, values in columns.items():
        table[name] = np.nan
        table.loc[chosen, name] = values
    rows = [chosen[i] for i in picked]
    table["rank_pattern"], table["alpha_pattern"] = 0, 0.0
    table.loc[rows, "rank_pattern"] = ranks
    table.loc[rows, "alpha_pattern"] = [float(alpha) for alpha in alphas]
    keys = pattern_keys([layer.name for layer in adapted])
    return AdaptiveLora(
        rank_pattern={keys[layer.name]: rank for layer, rank in zip(adapted, ranks, strict=True)},
        alpha_pattern={keys[layer.name]: alpha for layer, alpha in zip(adapted, alphas, strict=True)},
        target_modules="|".join(re.escape(layer.name) for layer in adapted),
        r=max(ranks),
        lora_alpha=max(alphas),
        parameters=sum(rank * layer.cost for layer, rank in zip(adapted, ranks, strict=True)),
        table=table,
        found=found,
    )


def pattern_keys(names: Sequence[str]) -> dict[str, str]:
    r"""Module name -> its key in rank_pattern and alpha_pattern: the name itself where PEFT takes it for no other.

    PEFT reads a key as a regular expression for the end of a name after a dot, and takes the first that fits, of keys
    that it sorts when it saves them. A name that would fit another one too (`fc` and `block.fc`, `a.b` and `a_b`), or
    has characters with a meaning of their own, is escaped and anchored: `^fc`, `^a\.b`.
    """
    shapes: dict[tuple[int, tuple[int, ...]], set[str]] = {}
    for name in names:
        dots = tuple(i for i, character in enumerate(name) if character == ".")
        shapes.setdefault((len(name), dots), set()).add(name)
    unclear = {name for name in names if not re.fullmatch(r"[\w.]+", name)}
    for (length, dots), alike in shapes.items():
        for name in names:
            end = name[-length:]
            if len(end) == length and (name == end or name[-length - 1] == "."):
                fits = "".join("." if i in dots else character for i, character in enumerate(end))
                if fits in alike and fits != name:
                    unclear.add(fits)
    return {name: f"^{re.escape(name)}" if name in unclear else name for name in names}


def _require(chosen: Sequence[int], why: str) -> None:
    if not chosen:
        raise ValueError(f"there are no layers to choose among: {why}")


def _plain_table(layers: Sequence[Layer]) -> Any:
    from pandas import DataFrame

    return DataFrame(
        {
            "layer_index": [layer.index for layer in layers],
            "layer_name": [layer.name for layer in layers],
            "shape": ["x".join(map(str, layer.shape)) for layer in layers],
            "lora_parameters_per_rank": [layer.cost for layer in layers],
        }
    )


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else float(alpha)

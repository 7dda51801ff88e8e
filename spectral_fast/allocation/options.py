"""How spectra are read, how scores become ranks, and presets of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectral_fast.options import check, option

if TYPE_CHECKING:
    from spectral_fast.allocation.layers import Layer

MOST = 2**16  # a rank, a factor or a weight: beyond it nothing but a slip is meant
METHODS = ("median", "goodness-of-fit", "fix-finger")

# Of SpectralOptions and RankOptions: the method as its paper has it is the default of both; "source" is what the
# reference code does.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "source": {
        "power_law_fitting_method": "goodness-of-fit",
        "rescale": False,
        "conv_aspect": "slices",
        "minimum_eigenvalues": 2,
        "select": "smallest",
    },
}


def preset_of(name: str) -> Mapping[str, Any]:
    """Values of a preset.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


@dataclass(frozen=True)
class SpectralOptions:
    """How a layer's spectrum is read; the defaults are the preset "paper"."""

    power_law_fitting_method: str = option(
        "median",
        "where the tail begins: in the middle, where the fit is best (goodness-of-fit), or near the histogram's peak",
        choices=METHODS,
    )
    xmin_position: int = option(2, "median: the tail is all above 1/xmin_position of the spectrum", low=2)
    histogram_bins: int = option(100, "fix-finger: bins of the histogram", low=1)
    finger_lower: str = option(
        "log", "fix-finger: lower bound log10(0.95 x), as elsewhere, or 0.95 x", choices=("log", "linear")
    )
    filter_near_zero_eigenvalues: bool = option(False, "leave out eigenvalues below the threshold, if any is above")
    eigenvalue_threshold: float = option(1e-5, "what counts as near zero", low=0)
    conv_normalization: float = option(0.5, "factor of the eigenvalues of convolutions", positive=True)
    conv_aspect: str = option(
        "channels",
        "M and N of a convolution: its channels, or the smallest and largest of (positions, out, in)",
        choices=("channels", "slices"),
    )
    sigma_method: str = option("mean", "how the bulk's variance is estimated", choices=("mean", "median", "kde"))
    tw_method: str = option("ww", "how far the edge lies beyond the bulk", choices=("ww", "johnstone"))
    apply_tracy_widom_correction: bool = option(True, "put the edge beyond the bulk's end by its fluctuations")
    rescale: bool = option(True, "rescale eigenvalues to mean 1 before the edge is found")
    minimum_eigenvalues: int = option(8, "layers with fewer have no exponent, and get no rank", low=2)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class RankOptions:
    """How scores become ranks; the defaults are the preset "paper"."""

    layer_selection_percentile: float = option(0.5, "share of the layers that get a rank", low=0, high=1)
    select: str = option("largest", "which scores get a rank", choices=("largest", "smallest"))
    minimum_rank: int = option(4, "rank of the lowest score that is selected", low=1, high=MOST)
    maximum_rank: int = option(64, "rank of the highest", low=1, high=MOST)
    rank_scaling_method: str = option("linear", "how ranks grow with scores", choices=("linear", "log", "sqrt"))
    alpha_scaling_factor: float = option(2.0, "lora_alpha of a module over its rank", positive=True, low=0, high=MOST)
    hill_weight: float = option(0.7, "weight of the tail exponent in the score", low=0, high=MOST)
    mp_spikes_weight: float = option(0.3, "weight of the spikes, fewer of which score higher", low=0, high=MOST)
    target_modules: tuple[str, ...] = option((), "last name components of the layers to choose among", shown="all")
    exclude_modules: tuple[str, ...] = option((), "last name components of layers that get no rank, e.g. lm_head")
    budget_params: int | None = option(None, "parameters that the adapter shall have, met to 1 %", low=1, high=10**15)
    budget_uniform_rank: int | None = option(
        None, "or: as many as with this rank on all layers there are to choose among", low=1, high=MOST
    )

    def __post_init__(self) -> None:
        check(self)
        if self.minimum_rank > self.maximum_rank:
            raise ValueError(
                f"minimum_rank must not be above maximum_rank; got {self.minimum_rank} and {self.maximum_rank}"
            )
        if self.budget_params is not None and self.budget_uniform_rank is not None:
            raise ValueError("budget_params and budget_uniform_rank exclude each other: leave out one")

    def wanted(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers that target_modules and exclude_modules leave.

        Raises:
            ValueError: a target that no layer is called.
        """
        kinds = [layer.name.rpartition(".")[2] for layer in layers]
        for name in self.target_modules:
            if name not in kinds:
                raise ValueError(f"no layer is called {name}; the model has {', '.join(sorted(set(kinds)))}")
        targets = self.target_modules or kinds
        return [
            layer
            for layer, kind in zip(layers, kinds, strict=True)
            if kind in targets and kind not in self.exclude_modules
        ]

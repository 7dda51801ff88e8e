"""How large the LoRA of each layer should be: by the spectrum of its weights, or by what its directions matter.

The tail of a weight matrix's spectrum is a power law where training has left its mark: its exponent alpha, found by
Hill's estimator, is small where a layer is trained well. Eigenvalues beyond the Marchenko-Pastur bulk of a random
matrix are spikes, each a direction that was learnt. Layers with large alpha and few spikes have most left to learn,
and get more of the adapter's directions.
"""

from spectral_fast.allocation.analysis import LayerSpectrum, SpectralOptions, spectra
from spectral_fast.allocation.config import (
    PRESETS,
    AdaptiveLora,
    allocate,
    compute_adaptive_lora_ranks,
    get_adaptive_lora_config,
    preset_of,
    spectral_analysis_for_adaptive_lora,
)
from spectral_fast.allocation.layers import Layer, layers_of
from spectral_fast.allocation.ranks import RankOptions

__all__ = [
    "PRESETS",
    "AdaptiveLora",
    "Layer",
    "LayerSpectrum",
    "RankOptions",
    "SpectralOptions",
    "allocate",
    "compute_adaptive_lora_ranks",
    "get_adaptive_lora_config",
    "layers_of",
    "preset_of",
    "spectra",
    "spectral_analysis_for_adaptive_lora",
]

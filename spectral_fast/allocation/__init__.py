"""How large the LoRA of each layer should be: by the spectrum of its weights, or by what its directions matter.

The tail of a weight matrix's spectrum is a power law where training has left its mark: its exponent alpha, found by
Hill's estimator, is small where a layer is trained well. Eigenvalues beyond the Marchenko-Pastur bulk of a random
matrix are spikes, each a direction that was learnt. Layers with large alpha and few spikes have most left to learn,
and get more of the adapter's directions.
"""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.allocation.analysis import LayerSpectrum as LayerSpectrum
    from spectral_fast.allocation.analysis import spectra as spectra
    from spectral_fast.allocation.config import AdaptiveLora as AdaptiveLora
    from spectral_fast.allocation.config import allocate as allocate
    from spectral_fast.allocation.config import compute_adaptive_lora_ranks as compute_adaptive_lora_ranks
    from spectral_fast.allocation.config import get_adaptive_lora_config as get_adaptive_lora_config
    from spectral_fast.allocation.config import (
        spectral_analysis_for_adaptive_lora as spectral_analysis_for_adaptive_lora,
    )
    from spectral_fast.allocation.layers import Layer as Layer
    from spectral_fast.allocation.layers import layers_of as layers_of
    from spectral_fast.allocation.options import PRESETS as PRESETS
    from spectral_fast.allocation.options import RankOptions as RankOptions
    from spectral_fast.allocation.options import SpectralOptions as SpectralOptions
    from spectral_fast.allocation.options import preset_of as preset_of
else:
    __getattr__, __dir__, __all__ = lazily(
        __name__,
        {
            "spectral_fast.allocation.analysis": ("LayerSpectrum", "spectra"),
            "spectral_fast.allocation.config": (
                "AdaptiveLora",
                "allocate",
                "compute_adaptive_lora_ranks",
                "get_adaptive_lora_config",
                "spectral_analysis_for_adaptive_lora",
            ),
            "spectral_fast.allocation.layers": ("Layer", "layers_of"),
            "spectral_fast.allocation.options": ("PRESETS", "RankOptions", "SpectralOptions", "preset_of"),
        },
    )

"""spectral_fast: the fast engine for the spectrum of LoRA adapters.

A trained LoRA adapter is a low-rank update ΔW = B A = U diag(s) Vᵀ. `probe` or `calibrate` measures how sensitive a
loss is to each singular value, `edit_adapter` reweights them by a policy and writes the adapter back; `prune_adapter`
leaves rank channels out. `get_adaptive_lora_config` finds ranks for a new adapter.
"""

from spectral_fast._version import __version__
from spectral_fast.adapter import Adapter
from spectral_fast.allocation import get_adaptive_lora_config, spectral_analysis_for_adaptive_lora
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.closed_form import sensitivity_from_gradients
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.calibration.probe import CalibrationOptions, probe
from spectral_fast.calibration.ranks import Ranks
from spectral_fast.edit import edit_adapter
from spectral_fast.functional import svd_lowrank_factors
from spectral_fast.policies import POLICIES
from spectral_fast.prune import PruneOptions, prune_adapter
from spectral_fast.sensitivity import Sensitivity
from spectral_fast.spectrum import Spectrum, lowrank_svd
from spectral_fast.toolbox.clip import ClipOptions, clip_adapter
from spectral_fast.toolbox.difference import compare_adapters
from spectral_fast.toolbox.export import export_adapter
from spectral_fast.toolbox.extraction import ExtractOptions, extract_adapter
from spectral_fast.toolbox.inspection import InspectOptions, inspect_adapter
from spectral_fast.toolbox.merging import MergeOptions, merge_adapters
from spectral_fast.toolbox.resize import ResizeOptions, resize_adapter

__all__ = [
    "POLICIES",
    "Adapter",
    "CalibrationOptions",
    "ClipOptions",
    "ExtractOptions",
    "InspectOptions",
    "MergeOptions",
    "ModelOptions",
    "PruneOptions",
    "Ranks",
    "ResizeOptions",
    "Sensitivity",
    "Spectrum",
    "__version__",
    "calibrate",
    "clip_adapter",
    "compare_adapters",
    "edit_adapter",
    "export_adapter",
    "extract_adapter",
    "get_adaptive_lora_config",
    "inspect_adapter",
    "lowrank_svd",
    "merge_adapters",
    "probe",
    "prune_adapter",
    "resize_adapter",
    "sensitivity_from_gradients",
    "spectral_analysis_for_adaptive_lora",
    "svd_lowrank_factors",
]

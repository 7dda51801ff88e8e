"""spectral_fast: the fast engine for the spectrum of LoRA adapters.

A trained LoRA adapter is a low-rank update ΔW = B A = U diag(s) Vᵀ. `probe` or `calibrate` measures how sensitive a
loss is to each singular value, `edit_adapter` reweights them by a policy and writes the adapter back,
`evaluate_adapters` tells what that did.

>>> from spectral_fast import POLICIES, Adapter, CalibrationOptions, edit_adapter, embedded, probe
>>> adapter = Adapter.open(embedded.adapter_dir())
>>> data = CalibrationOptions(calib_data=str(embedded.calibration_file()), calib_samples=4)
>>> sensitivity = probe(adapter, adapter.select(("o_proj",)), embedded.base_model_dir(), data)
>>> edited = edit_adapter(adapter, POLICIES["abs_select"](), "edited", sensitivity=sensitivity)
>>> [len(module.s) for module in edited.values()]  # singular values of each module
[32, 32, 32, 32]

What else the commands do is in `spectral_fast.toolbox` (resize, clip, prune, export, merge, extract, inspect, diff),
`evaluation`, `sweep`, `allocation` (ranks), `training`, `report` and `study`; the kernels are in `kernels`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectral_fast._version import __version__
from spectral_fast.adapter import Adapter
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.closed_form import sensitivity_from_gradients
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.calibration.probe import CalibrationOptions, probe
from spectral_fast.edit import edit_adapter
from spectral_fast.functional import svd_lowrank_factors
from spectral_fast.policies import POLICIES
from spectral_fast.sensitivity import Sensitivity
from spectral_fast.spectrum import Spectrum, lowrank_svd

if TYPE_CHECKING:
    from spectral_fast.allocation import get_adaptive_lora_config
    from spectral_fast.evaluation import evaluate_adapters
    from spectral_fast.publish import push_to_hub

__all__ = [
    "POLICIES",
    "Adapter",
    "CalibrationOptions",
    "ModelOptions",
    "Sensitivity",
    "Spectrum",
    "__version__",
    "calibrate",
    "edit_adapter",
    "evaluate_adapters",
    "get_adaptive_lora_config",
    "lowrank_svd",
    "probe",
    "push_to_hub",
    "sensitivity_from_gradients",
    "svd_lowrank_factors",
]

# Neither a probe nor an edit needs the modules of these, which are half of the package.
_LATER = {"evaluate_adapters": "evaluation", "get_adaptive_lora_config": "allocation", "push_to_hub": "publish"}


def __getattr__(name: str) -> Any:
    """The functions whose modules are imported when they are first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)

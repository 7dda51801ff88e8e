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

from typing import TYPE_CHECKING

from spectral_fast._version import __version__ as __version__
from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.adapter.folder import Adapter as Adapter
    from spectral_fast.allocation.config import get_adaptive_lora_config as get_adaptive_lora_config
    from spectral_fast.calibration.calibrate import calibrate as calibrate
    from spectral_fast.calibration.closed_form import sensitivity_from_gradients as sensitivity_from_gradients
    from spectral_fast.calibration.options import CalibrationOptions as CalibrationOptions
    from spectral_fast.calibration.options import ModelOptions as ModelOptions
    from spectral_fast.calibration.probe import probe as probe
    from spectral_fast.edit import edit_adapter as edit_adapter
    from spectral_fast.evaluation.adapters import evaluate_adapters as evaluate_adapters
    from spectral_fast.functional import svd_lowrank_factors as svd_lowrank_factors
    from spectral_fast.policies import POLICIES as POLICIES
    from spectral_fast.publish.upload import push_to_hub as push_to_hub
    from spectral_fast.sensitivity import Sensitivity as Sensitivity
    from spectral_fast.spectrum import Spectrum as Spectrum
    from spectral_fast.spectrum import lowrank_svd as lowrank_svd
else:
    __getattr__, __dir__, __all__ = lazily(
        __name__,
        {
            "spectral_fast.adapter.folder": ("Adapter",),
            "spectral_fast.allocation.config": ("get_adaptive_lora_config",),
            "spectral_fast.calibration.calibrate": ("calibrate",),
            "spectral_fast.calibration.closed_form": ("sensitivity_from_gradients",),
            "spectral_fast.calibration.options": ("CalibrationOptions", "ModelOptions"),
            "spectral_fast.calibration.probe": ("probe",),
            "spectral_fast.edit": ("edit_adapter",),
            "spectral_fast.evaluation.adapters": ("evaluate_adapters",),
            "spectral_fast.functional": ("svd_lowrank_factors",),
            "spectral_fast.policies": ("POLICIES",),
            "spectral_fast.publish.upload": ("push_to_hub",),
            "spectral_fast.sensitivity": ("Sensitivity",),
            "spectral_fast.spectrum": ("Spectrum", "lowrank_svd"),
        },
    )

"""PEFT's configuration of an LS-LoRA."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from peft import LoraConfig

from spectral_fast.splines import PEFT_TYPE, PRESETS, SplineOptions, options_of

# Under which the update is not a function of B A x alone, or which takes B A out of the base weights at the start.
_EXCLUDED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "target_parameters",
)
_INITS = (True, False, "gaussian")


class SplineType(str, Enum):
    """The method's name in adapter_config.json. PEFT's own enumeration is closed; it compares names as text."""

    LSLORA = PEFT_TYPE


@dataclass
class LSLoraConfig(SplineOptions, LoraConfig):  # type: ignore[misc]
    """LoRA with a learned activation after it: y = W x + s_out · φ(s_in · clamp(scaling · B A x)).

    All fields of PEFT's LoraConfig (ranks, patterns, rsLoRA, dropout, modules_to_save) and of `SplineOptions`.

    Raises:
        TypeError: a field of `SplineOptions` is of another type.
        ValueError: one is out of its range, or a field of LoraConfig asks for what cannot be combined with a spline.
    """

    def __post_init__(self) -> None:
        LoraConfig.__post_init__(self)
        self.peft_type = SplineType.LSLORA
        checked = self.options
        for f in fields(SplineOptions):  # an int that was given for a float is one now
            setattr(self, f.name, getattr(checked, f.name))
        given = [name for name in _EXCLUDED if getattr(self, name, None)]
        if given:
            raise ValueError(f"{given[0]} cannot be combined with a spline; leave it out, or take plain LoRA")
        if self.init_lora_weights not in _INITS:
            raise ValueError(
                f"init_lora_weights must be true, false or gaussian with a spline; got {self.init_lora_weights!r}, "
                "which needs an update that can be taken out of the base weights"
            )

    @property
    def options(self) -> SplineOptions:
        """The part that is about splines."""
        return options_of(vars(self))

    @classmethod
    def preset(cls, name: str, **given: Any) -> LSLoraConfig:
        """One of `PRESETS`, V0 to V7, with other fields as given."""
        if name not in PRESETS:
            raise ValueError(f"a preset is one of {', '.join(PRESETS)}; got {name!r}")
        return cls(**{**PRESETS[name], **given})

"""What PEFT and bitsandbytes are told: the adapter's configuration, and how base weights are quantised."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from spectral_fast.training.options import ALL_LINEAR, LoraModelConfig
from spectral_fast.training.ranks import RankAssignmentConfig, adaptive_lora
from spectral_fast.training.spline import SplineArguments


def lora_config(model: LoraModelConfig, ranks: RankAssignmentConfig, spline: SplineArguments) -> Any:
    """PEFT's LoraConfig, or LSLoraConfig, of one rank or of adaptive ones; None without `use_peft`."""
    from peft import LoraConfig

    if not model.use_peft:
        return None
    make, how = (
        LoraConfig,
        {
            "task_type": model.lora_task_type,
            "lora_dropout": model.lora_dropout,
            "modules_to_save": list(model.lora_modules_to_save) or None,
            "use_rslora": model.use_rslora,
            "use_dora": model.use_dora,
        },
    )
    if spline.use_spline:
        from spectral_fast.lslora import LSLoraConfig

        make, how = LSLoraConfig, how | spline.shape()
    if ranks.adaptive_ranks:
        return make(**adaptive_lora(model, ranks).fields(), **how)
    modules = ALL_LINEAR if model.adapts_all else list(model.lora_target_modules)
    return make(r=model.lora_r, lora_alpha=model.lora_alpha, target_modules=modules, **how)


def quantization(model: LoraModelConfig) -> Any:
    """What bitsandbytes shall do, as transformers takes it; None where weights stay as they are.

    Raises:
        RuntimeError: bitsandbytes is not installed.
    """
    if model.bits is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise RuntimeError(
            f"{model.bits} bits per weight need bitsandbytes, which is not installed: pip install 'spectral-fast[bnb]'"
        )
    from transformers import BitsAndBytesConfig

    if model.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    _, dtype = model.loading().resolved()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
    )

"""LoRA on base layers whose weights bitsandbytes holds in 8 or 4 bits."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn


def is_lora_linear(layer: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer on a linear one, quantised or not."""
    from peft.tuners.lora import Linear

    if _bitsandbytes() is None:
        return isinstance(layer, Linear)
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    return isinstance(layer, (Linear, Linear4bit, Linear8bitLt))


def compute_dtype(layer: Any) -> torch.dtype | None:
    """The dtype that a linear layer computes in; None for a quantised one that takes what it gets."""
    found = next((p.dtype for p in layer.parameters() if p.is_floating_point()), None)
    return getattr(layer, "compute_dtype", None) or found


def keep_differentiable(model: nn.Module, *, always: bool = False) -> None:
    """Put bitsandbytes' 4-bit layers in training mode.

    On a CPU one in evaluation mode packs its weights for good in a form that gradients do not go through.

    Args:
        model: with such layers, or without.
        always: they stay in it when the model is put in evaluation mode, as a trainer does in between.

    Raises:
        ValueError: naming a layer that is packed so already.
    """
    bitsandbytes = _bitsandbytes()
    if bitsandbytes is None:
        return
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: bitsandbytes packed its 4-bit weights when the model was run for inference, and "
                    "gradients do not go through them; load the model again, and calibrate first"
                )
            layer.training = True
            if always:
                layer.train = partial(_unchanged, layer)


def _unchanged(layer: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 (that of nn.Module.train)
    return layer


def _bitsandbytes() -> Any:
    """The module, if it is in use: whoever made its layers has imported it."""
    return sys.modules.get("bitsandbytes")

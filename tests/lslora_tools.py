"""A tiny model with LS-LoRA that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from tiny_models import tiny_llama
from torch import Tensor

from spectral_fast.lslora import LSLoraConfig

IDS = torch.arange(20).view(2, 10)
TARGETS = ["q_proj", "o_proj", "down_proj"]
LAYER = "base_model.model.model.layers.1.mlp.down_proj"


def splined(seed: int = 0, model: Any = None, **config: Any) -> Any:
    """A tiny model with LS-LoRA, of whose parameters none is what it was at first."""
    config = {"r": 6, "lora_alpha": 12, "target_modules": TARGETS, **config}
    peft_model = get_peft_model(tiny_llama() if model is None else model, LSLoraConfig(**config))
    randomise(peft_model, seed)
    return peft_model


def randomise(peft_model: Any, seed: int, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if f".{adapter}" in name and ("lora_B" in name or "lora_spline" in name):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def logits(model: Any, **kwargs: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **kwargs).logits
    return found

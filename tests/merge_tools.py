"""Adapters to merge, and what they stand for, dense and in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from adapter_tools import save
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama

from spectral_fast.adapter import Adapter

TARGETS = ["q_proj", "o_proj", "down_proj"]


def peft_adapter(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An adapter of the tiny Llama with random factors."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | config
    model = get_peft_model(tiny_llama(), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return save(model, folder)


def update(folder: Path | str, **options: Any) -> dict[str, torch.Tensor]:
    """Module -> scaling · B A."""
    adapter = Adapter.open(folder, include_conv=True, include_embedding=True, **options)
    return {
        name: module.scaling * (b.double() @ a.double())
        for name, module in adapter.modules.items()
        for b, a in [adapter.read(module)]
    }


def weighted_sum(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """Σ w ΔW of every module that any of them has."""
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in update(folder).items():
            total[name] = total.get(name, torch.zeros(())) + weight * delta
    return total


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())

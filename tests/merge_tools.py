"""Adapters to merge, and what they stand for, dense and in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapter_tools import handmade, save
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama

from spectral_fast.adapter import Adapter
from spectral_fast.toolbox.merging import METHODS, MergedModule, MergeOptions, merge_adapters

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


def merge(
    folders: Sequence[Path], weights: Sequence[float], out: Path, *, method: str, **settings: Any
) -> dict[str, MergedModule]:
    """What `merge_adapters` returns for these folders."""
    call = {key: settings.pop(key) for key in ("overwrite", "modules", "warn") if key in settings}
    if METHODS[method].sparsify:
        settings.setdefault("density", 0.5)
    options = MergeOptions(method=method, **settings)
    return merge_adapters([Adapter.open(x) for x in folders], weights, options, out, **call)


def layer_adapter(folder: Path, modules: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    """An adapter of factors b, a by name."""
    tensors = {}
    for name, (b, a) in modules.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.clone()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.clone()
    return handmade(folder, config, tensors)


def random_factors(m: int, n: int, r: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """b (m, r) and a (r, n)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((m, r), (r, n)))


def three_adapters(folder: Path) -> list[Path]:
    """Of ranks 4, 2 to 6, and 3; the last has other targets."""
    return [
        peft_adapter(folder / "a", 1),
        peft_adapter(folder / "b", 2, r=6, rank_pattern={"o_proj": 2}, alpha_pattern={"q_proj": 3}, use_rslora=True),
        peft_adapter(folder / "c", 3, r=3, target_modules=["o_proj", "up_proj"]),
    ]

"""Adapters on disk, made by PEFT or by hand, and what is read of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spectral_fast.adapter import Adapter


def save(model: Any, folder: Path, **options: Any) -> Path:
    """PEFT's own save, without its notes on embeddings and lora_bias (it thinks the bias a broken factor)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", message=".*have invalid shape.*lora_B.bias")
        model.save_pretrained(str(folder), **options)
    return folder


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2 * 9).reshape(2, 9)).logits


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def randomise(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def everything(adapter: Adapter) -> Any:
    return ((module, *adapter.read(module)) for module in adapter.modules.values())


def handmade(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """An adapter in PEFT's format: r = 4, alpha = 8, o_proj and down_proj in layers 0 to 2."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    if tensors is None:
        tensors = {}
        for layer in range(3):
            for name, m, n in (("self_attn.o_proj", 10, 12), ("mlp.down_proj", 10, 14)):
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, n, generator=generator).bfloat16()
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(m, 4, generator=generator).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder

"""Adapters with everything odd about them, and what they stand for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from adapter_tools import handmade, randomise, save
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_llama

from spectral_fast.adapter import Adapter
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity
from spectral_fast.spectrum import lowrank_svd

PREFIX = "base_model.model.model.layers"
# Of PEFT, on patterns with rslora and on what it saves beside factors.
IGNORE = "ignore:.*(rslora|Rank-Stabilized|lora_bias|tie_word|save_embedding)"


def update(folder: Path, **opened: Any) -> dict[str, torch.Tensor]:
    """Module -> scaling · B A in float64."""
    adapter = Adapter.open(folder, **opened)
    return {
        name: module.scaling * (b.double() @ a.double())
        for name, module in adapter.modules.items()
        for b, a in [adapter.read(module)]
    }


def odd(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Ranks 4, 6 and 8, alphas 8 and 5, B = 0 in one module, r > min(m, n) in another, and a dead direction."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "0.self_attn.q_proj": (10, 12, 4),
        "1.self_attn.q_proj": (10, 12, 4),
        "0.mlp.down_proj": (10, 14, 6),
        "1.mlp.down_proj": (10, 14, 6),
        "0.mlp.router": (3, 5, 8),
    }
    tensors = {}
    for name, (m, n, r) in shapes.items():
        b, a = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
        if name == "1.mlp.down_proj":
            b[:] = 0
        if name == "1.self_attn.q_proj":
            a[2] = a[1]
            b[:, 2] = -b[:, 1]  # together they are nothing, and A has two equal rows
        tensors[f"{PREFIX}.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"{PREFIX}.{name}.lora_B.weight"] = b.to(dtype)
    patterns = {"rank_pattern": {"down_proj": 6, "router": 8}, "alpha_pattern": {"down_proj": 5}}
    return handmade(folder, {**patterns, **config}, tensors)


def peft_adapter(folder: Path, **config: Any) -> Path:
    """Saved by PEFT, on the tiny Llama."""
    defaults = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return save(randomise(get_peft_model(tiny_llama(), LoraConfig(**{**defaults, **config}))), folder)


def in_peft(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> ΔW as PEFT has it after loading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_llama(), str(folder))
    layers = ((name, x) for name, x in model.named_modules() if hasattr(x, "get_delta_weight"))
    return {name: x.get_delta_weight("default").detach() for name, x in layers}


def sensitivities(adapter: Adapter, seed: int = 0) -> Sensitivity:
    """As `probe` leaves them, g at random."""
    generator = torch.Generator().manual_seed(seed)
    names = list(adapter.modules)
    bs, as_ = map(list, zip(*(adapter.read(x) for x in adapter.modules.values()), strict=True))
    return Sensitivity(
        {
            name: ModuleSensitivity(x.s.clone(), torch.randn(len(x.s), generator=generator, dtype=torch.float64))
            for name, x in zip(names, lowrank_svd(bs, as_), strict=True)
        },
        {"adapter_sha256": adapter.fingerprint()},
    )


def many(folder: Path, layers: int, experts: int) -> Path:
    """Thousands of tiny modules: experts · 3 in each layer, r = 8, float32."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for expert in range(experts):
            for name, m, n in (("gate_proj", 32, 48), ("up_proj", 32, 48), ("down_proj", 48, 32)):
                prefix = f"{PREFIX}.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, n, generator=generator)
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(m, 8, generator=generator)
    return handmade(folder, {"r": 8, "lora_alpha": 16}, tensors)

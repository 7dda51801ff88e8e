"""Small models and adapters that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random Llama of three layers, hidden 48: odd enough that no two dimensions agree."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    defaults = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**defaults, **config}))
    return model.to(dtype)


def with_lora(model: Any, seed: int = 0, **config: Any) -> Any:
    """The model with a LoRA whose B is random, so that no branch is zero."""
    from peft import LoraConfig, get_peft_model

    defaults = {"r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    torch.manual_seed(seed + 1)
    peft_model = get_peft_model(model, LoraConfig(**{**defaults, **config}))
    randomise_b(peft_model, seed)
    return peft_model


def randomise_b(peft_model: Any, seed: int = 0) -> None:
    """Fill every lora_B with random values."""
    generator = torch.Generator().manual_seed(seed + 2)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


class Convolutional(nn.Module):
    """Two convolutions, one of them grouped, a linear layer and a head of two classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.first = nn.Conv2d(12, 20, (3, 2))
        self.second = nn.Conv2d(20, 24, 3)
        self.grouped = nn.Conv2d(24, 48, 1, groups=4)
        self.fc = nn.Linear(48, 32)
        self.head = nn.Linear(32, 2)

"""A base model, and one that was tuned in full, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_llama
from torch import Tensor

Change = Callable[[str, Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(name: str, weight: Tensor, rank: int = 3) -> Tensor:
    """A change of that rank in every projection, another in each."""
    if not name.endswith("proj.weight"):
        return torch.zeros(())
    seed = len(name) * 1000 + sum(map(ord, name))
    return 0.1 * randn(weight.shape[0], rank, seed=seed) @ randn(rank, weight.shape[1], seed=seed + 1)


def two_models(
    folder: Path, change: Change, model: Callable[[], Any] = tiny_llama, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """A base model and one whose weights were changed, saved in shards."""
    base = model().to(dtype)
    base.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter += change(name, parameter)
    base.save_pretrained(folder / "tuned", max_shard_size="40KB")
    return str(folder / "base"), str(folder / "tuned")

"""Vectors for sketches of streams, and how far a basis is from orthonormal."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=-1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonality(basis: Tensor) -> float:
    rows = basis[basis.any(1)]
    return float((rows @ rows.mT - torch.eye(len(rows), dtype=torch.float64)).norm())

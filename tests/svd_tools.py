"""What an SVD of a batch of small matrices is tested for, and matrices that are hard on it."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_is_svd(x: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> None:
    """LAPACK's test ratios, each at most 30, and the singular values against those of float64."""
    r = x.shape[-1]
    allowed = 30 * r * torch.finfo(x.dtype).eps
    assert u.dtype == s.dtype == vh.dtype == x.dtype
    assert (u.shape, s.shape, vh.shape) == (x.shape, x.shape[:2], x.shape)
    assert (s >= 0).all()
    assert (s.diff(dim=1) <= 0).all()
    # In float64, relative to the largest element: squares must not overflow.
    scale = x.double().abs().amax((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    x, s = x.double() / scale[:, None, None], s.double() / scale[:, None]
    u, vh = u.double(), vh.double()
    one = torch.eye(r, dtype=torch.float64)
    size = torch.linalg.norm(x, dim=(1, 2))
    assert (torch.linalg.norm((u * s[:, None]) @ vh - x, dim=(1, 2)) <= allowed * size).all()
    assert (torch.linalg.norm(u.mT @ u - one, dim=(1, 2)) <= allowed).all()
    assert (torch.linalg.norm(vh @ vh.mT - one, dim=(1, 2)) <= allowed).all()
    oracle = torch.linalg.svdvals(x)
    assert ((s - oracle).abs().amax(1) <= allowed * oracle[:, 0]).all()


def orthogonal(r: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q


def graded(r: int, condition: float, generator: torch.Generator) -> Tensor:
    """Singular values from 1 to 1 / condition."""
    s = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)
    return orthogonal(r, generator) * s @ orthogonal(r, generator)


def hard_matrices(r: int) -> dict[str, Tensor]:
    """By name, (r, r) in float64; the names are the same for every r."""
    g = torch.Generator().manual_seed(r)
    one = torch.eye(r, dtype=torch.float64)
    dead, twice = graded(r, 10, g), graded(r, 10, g)
    dead[:, : r // 3] = 0
    dead[r // 2] = 0
    twice[:, 0] = twice[:, r // 2]
    clusters = torch.tensor([3.0, 1.0, 1e-3], dtype=torch.float64).repeat_interleave(-(-r // 3))[:r]
    return {
        **{f"condition {condition:g}": graded(r, condition, g) for condition in (1, 1e2, 1e4, 1e8)},
        **{f"times {scale:g}": graded(r, 1e3, g) * scale for scale in (1e30, 1e-30)},
        "zero": one * 0,
        "ones": one * 0 + 1,
        "identity": one,
        "a unit beside the diagonal": one.roll(1, 1).tril(),
        "dead columns and a dead row": dead,
        "a column twice": twice,
        "rank 3": graded(r, 10, g)[:, :3] @ graded(r, 10, g)[:3],
        "repeated singular values": orthogonal(r, g) * clusters @ orthogonal(r, g),
    }


def several(count: int, r: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gaussian matrices."""
    return torch.randn(count, r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

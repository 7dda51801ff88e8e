"""Sums of products for many modules at once, for tools that hold what a module saw rather than its projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_fast.backends import Backend, pick, register
from spectral_fast.kernels import gpu, native
from spectral_fast.kernels.sensitivity.module import Module
from spectral_fast.kernels.sensitivity.op import check_starts, reference


def grouped_products(modules: Sequence[Module], starts: Tensor | None = None) -> list[Tensor]:
    """Per module and segment Σ (x[n] V) ⊙ (dy[n] U) over starts[t] ≤ n < starts[t + 1], times the scaling ∂L/∂s.

    Projections are summed and multiplied in float32, and never leave the chip on a GPU, where all modules of one dtype
    and of one class of ranks are one launch. Not differentiable.

    Args:
        modules: of any shapes and ranks, but the same tokens.
        starts: first token of each segment and, last, the number of tokens: (segments + 1,) int64, on the CPU,
            starting at 0 and not descending. None for one segment of all tokens.

    Returns:
        for each module (segments, r) float32, or float64 if x or u is.

    Raises:
        ValueError: shapes or starts do not fit.
        TypeError: dtypes do not fit.

    Cost: reads x and dy once, 2 · tokens · (n + m) · r flops a module.
    """
    modules = [Module(*(t.detach() for t in module)) for module in modules]
    if not modules:
        return []
    tokens = len(modules[0].x)
    for i, module in enumerate(modules):
        _check(i, module, tokens)
    starts = torch.tensor([0, tokens]) if starts is None else starts
    check_starts(starts, tokens)
    sums: list[Tensor] = pick("grouped_products", modules, starts).call(modules, starts)
    return sums


def _check(i: int, module: Module, tokens: int) -> None:
    x, dy, u, vh = module
    m, r = u.shape if u.ndim == 2 else (-1, -1)
    if x.shape != (tokens, vh.shape[-1]) or dy.shape != (tokens, m) or vh.ndim != 2 or len(vh) != r:
        raise ValueError(
            f"grouped_products wants x ({tokens}, n), dy ({tokens}, m), u (m, r), vh (r, n); got for module {i} "
            f"x {tuple(x.shape)}, dy {tuple(dy.shape)}, u {tuple(u.shape)}, vh {tuple(vh.shape)}"
        )
    fits = x.dtype == dy.dtype and u.dtype == vh.dtype and torch.promote_types(x.dtype, u.dtype) == u.dtype
    if not fits or x.dtype not in native.CODES or u.dtype not in native.CODES:
        raise TypeError(
            f"x and dy must share one of {', '.join(map(str, native.CODES))}, and u and vh that or a wider one; got "
            f"for module {i} x {x.dtype}, dy {dy.dtype}, u {u.dtype}, vh {vh.dtype}"
        )
    if len({t.device for t in module}) > 1:
        raise ValueError(f"module {i} must be on one device, got {', '.join(str(t.device) for t in module)}")


def grouped_reference(modules: Sequence[Module], starts: Tensor) -> list[Tensor]:
    """The definition."""
    sums = []
    for x, dy, u, vh in modules:
        wide = torch.promote_types(u.dtype, torch.float32)
        sums.append(reference(x.to(wide) @ vh.to(wide).mT, dy.to(wide) @ u.to(wide), starts))
    return sums


def _gpu(modules: Sequence[Module], starts: Tensor) -> list[Tensor]:
    from spectral_fast.kernels.sensitivity.gpu import grouped_products

    return grouped_products(modules, starts)


def _refuses(modules: Sequence[Module] = (), starts: Tensor | None = None) -> str | None:  # noqa: ARG001
    for x, _, u, _ in modules:
        if u.dtype == torch.float64:
            return "sums are in float32, and a module is float64"
        if u.shape[1] > gpu.RANKS[-1]:
            return f"rank {u.shape[1]} of x {tuple(x.shape)} is above {gpu.RANKS[-1]}"
    devices = {str(module.x.device) for module in modules}
    if len(devices) > 1:
        return f"modules are on {', '.join(sorted(devices))}"
    return gpu.refuses(x for module in modules for x in module)


register("grouped_products", Backend("gpu", _refuses, _gpu), Backend("reference", lambda *_: None, grouped_reference))

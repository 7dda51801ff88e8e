"""Products with frozen weights, in the precision in which the processor is fast."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

ROWS = 64  # below, widening the weight costs more than it saves
WIDENED = 2**25  # elements of a weight at once: 128 MB, where the head of a large model takes half a gigabyte and more


class WideProducts(TorchFunctionMode):
    """Within this mode F.linear forms products of half precision in float32, where that is the faster way.

    x86 processors without matrix tiles multiply bfloat16 at about half the speed of float32 (measured with oneDNN on
    AVX-512: 165 against 300 GFLOP/s). Operands are widened into memory that is used again and again, the product is
    rounded to their dtype once, and nothing but the weight itself is kept for the backward pass. Only products with
    weights that need no gradient are taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """F.linear in float32 where it pays; everything else as it is."""
        if func is F.linear and not kwargs and _pays(*args):
            x, weight, *bias = args
            # Shapes change outside of the function, whose output may not be a view: some models add to it in place.
            y = _FrozenLinear.apply(self, x.reshape(-1, x.shape[-1]), weight, *bias)  # type: ignore[no-untyped-call]
            return y.view(*x.shape[:-1], len(weight))
        return func(*args, **(kwargs or {}))

    def product(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The matrix product x w, (rows, k) and (k, m), plus a bias (m,), rounded to x's dtype."""
        wide, out = self._wide("x", x), self._room("y", torch.Size((len(x), w.shape[1])))
        summed = w.is_contiguous()  # the weight's own rows are then what the product sums over
        rows = w if summed else w.mT
        step = max(1, WIDENED // rows.shape[1])
        for a in range(0, len(rows), step):
            part = self._wide("w", rows[a : a + step])
            if summed:
                torch.addmm(out, wide[:, a : a + step], part, beta=min(a, 1), out=out)
            else:
                torch.mm(wide, part.mT, out=out[:, a : a + step])
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    def _wide(self, role: str, x: Tensor) -> Tensor:
        return self._room(role, x.shape).copy_(x)

    def _room(self, role: str, shape: torch.Size) -> Tensor:
        if role not in self._memory or self._memory[role].numel() < shape.numel():
            self._memory[role] = torch.empty(shape.numel())
        return self._memory[role][: shape.numel()].view(shape)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: WideProducts, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.products = products
        ctx.save_for_backward(weight)
        return products.product(x, weight.mT, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        [weight] = ctx.saved_tensors
        return None, ctx.products.product(dy, weight), None, None


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.shape[:-1].numel() >= ROWS
        and weight.is_contiguous()
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and float32_is_faster()
    )


@cache
def float32_is_faster() -> bool:
    """Whether this processor multiplies float32 faster than half precision: x86 without AMX."""
    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_amx_tile_supported()

"""Triton: a program has a block of elements; backward it leaves a row of sums, which are then added in order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_fast.kernels.gpu import Shipped, Variant
from spectral_fast.kernels.pointers import from_bfloat16, to_bfloat16
from spectral_fast.kernels.spline.reference import SOFTNESS, Shape, parameter_gradients


@triton.jit
def widened(x):
    """As float32."""
    return from_bfloat16(x) if x.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def store(p, x, mask):
    """In the pointer's dtype."""
    if p.dtype.element_ty == tl.bfloat16:
        tl.store(p, to_bfloat16(x), mask=mask)
    else:
        tl.store(p, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def clipped(x, low, high):
    """NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def whole(x, last):
    """The whole part, at least 0 and at most `last`; 0 of NaN."""
    x = tl.where(x > 0, x, 0.0)
    return tl.where(x < last, x, last).to(tl.int32)


@triton.jit
def weight(u, nearest, i, SOFTNESS: tl.constexpr):
    """The soft weight of knot i over that of the nearest one."""
    return tl.exp(((u - nearest) * (u - nearest) - (u - i) * (u - i)) * (1.0 / SOFTNESS))


@triton.jit
def average(s, p_values, knots, rate, offset, SOFTNESS: tl.constexpr):
    """Of the soft spline: u and the nearest knot, the sum of weights, the value, and dφ/du."""
    u = s * rate + offset
    nearest = whole(u + 0.5, (knots - 1).to(tl.float32)).to(tl.float32)
    total = tl.zeros_like(u)
    sum_v = tl.zeros_like(u)
    sum_i = tl.zeros_like(u)
    sum_iv = tl.zeros_like(u)
    for i in range(knots):
        v = tl.load(p_values + i)
        w = weight(u, nearest, i, SOFTNESS)
        total += w
        sum_v += w * v
        sum_i += w * (i - nearest)
        sum_iv += w * (i - nearest) * v
    mean = sum_v / total
    return u, nearest, total, mean, (sum_iv - mean * sum_i) / total * (2.0 / SOFTNESS)


@triton.jit
def piece(s, p_values, knots, k_min, dk, rate, offset, mask):
    """Of the piecewise spline: u, the piece, its intercept and slope."""
    u = s * rate + offset
    i = whole(u, (knots - 2).to(tl.float32))
    v = tl.load(p_values + i, mask=mask, other=0.0)
    slope = (tl.load(p_values + i + 1, mask=mask, other=0.0) - v) * rate
    return u, i, v - slope * (k_min + i.to(tl.float32) * dk), slope


@triton.jit(do_not_specialize=["knots"])
def spline_kernel(
    p_x, p_values, p_in, p_out, p_base, p_y, n, knots, k_min, dk, rate, offset, low, high, lowest, highest,
    SOFT: tl.constexpr, BASE: tl.constexpr, SOFTNESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Y = s_out φ(s_in x) + base, x clamped to low and high, s_in x to lowest and highest."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = o < n
    b_x = widened(tl.load(p_x + o, mask=mask, other=0.0))  # (BLOCK,)
    b_s = clipped(b_x, low, high) * tl.load(p_in)
    if SOFT:
        _, _, _, b_y, _ = average(b_s, p_values, knots, rate, offset, SOFTNESS)
    else:
        b_s = clipped(b_s, lowest, highest)
        _, _, b_intercept, b_slope = piece(b_s, p_values, knots, k_min, dk, rate, offset, mask)
        b_y = b_intercept + b_slope * b_s
    b_y *= tl.load(p_out)
    if BASE:
        b_y += widened(tl.load(p_base + o, mask=mask, other=0.0))
    store(p_y + o, b_y, mask)


@triton.jit(do_not_specialize=["knots"])
def spline_backward_kernel(
    p_dy, p_x, p_values, p_in, p_out, p_dx, p_sums, n, knots, k_min, dk, rate, offset, low, high, lowest, highest,
    SOFT: tl.constexpr, SOFTNESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, and sums[i_block] (knots + 1) = Σ dy w_i for every knot, Σ dy φ'(s) x."""
    i_block = tl.program_id(0).to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = o < n
    b_x = widened(tl.load(p_x + o, mask=mask, other=0.0))  # (BLOCK,)
    b_dy = widened(tl.load(p_dy + o, mask=mask, other=0.0))  # (BLOCK,)
    b_inside = clipped(b_x, low, high)
    s_in = tl.load(p_in)
    b_s = b_inside * s_in
    p_sum = p_sums + i_block * (knots + 1)
    if SOFT:
        b_u, b_nearest, b_total, _, b_slope = average(b_s, p_values, knots, rate, offset, SOFTNESS)
        b_slope *= rate
        b_dy_total = b_dy / b_total
        for i in range(knots):
            tl.store(p_sum + i, tl.sum(b_dy_total * weight(b_u, b_nearest, i, SOFTNESS), 0))
    else:
        b_on_grid = clipped(b_s, lowest, highest)
        b_u, b_i, _, b_slope = piece(b_on_grid, p_values, knots, k_min, dk, rate, offset, mask)
        b_slope = tl.where(b_on_grid == b_s, b_slope, 0.0)
        b_right = b_dy * (b_u - b_i.to(tl.float32))
        b_left = b_dy - b_right
        for i in range(knots):
            b_term = tl.where(b_i == i, b_left, 0.0) + tl.where(b_i == i - 1, b_right, 0.0)
            tl.store(p_sum + i, tl.sum(b_term, 0))
    b_ds = b_dy * b_slope
    tl.store(p_sum + knots, tl.sum(b_ds * b_inside, 0))
    b_dx = tl.where(b_inside == b_x, b_ds * (s_in * tl.load(p_out)), 0.0)
    store(p_dx + o, b_dx, mask)


def forward_variant(soft: bool, base: bool) -> Variant:
    """What forms y."""
    return Variant(spline_kernel, {"SOFT": soft, "BASE": base, "SOFTNESS": SOFTNESS, "BLOCK": 2048})


def backward_variant(soft: bool) -> Variant:
    """What forms dx and the sums of a block."""
    return Variant(spline_backward_kernel, {"SOFT": soft, "SOFTNESS": SOFTNESS, "BLOCK": 2048}, warps=8)


def forward(
    x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, shape: Shape, base: Tensor | None
) -> Tensor:
    """The backend's call."""
    x, base = x.contiguous(), None if base is None else base.contiguous()
    y = torch.empty_like(x) if base is None else torch.empty_like(base)
    variant = forward_variant(shape.soft, base is not None)
    parameters = (values.float().contiguous(), input_scale.float(), output_scale.float())
    arguments = (x, *parameters, x if base is None else base, y, *_constants(x, values, shape))
    variant.launch((triton.cdiv(x.numel(), variant.constants["BLOCK"]),), *arguments)
    return y


def backward(
    dy: Tensor, x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend's call; torch adds the blocks' sums, in float64 and without atomics."""
    x, dy = x.contiguous(), dy.contiguous()
    dx, variant = torch.empty_like(x), backward_variant(shape.soft)
    blocks = triton.cdiv(x.numel(), variant.constants["BLOCK"])
    sums = x.new_empty(blocks, len(values) + 1, dtype=torch.float32)
    parameters = (values.float().contiguous(), input_scale.float(), output_scale.float())
    variant.launch((blocks,), dy, x, *parameters, dx, sums, *_constants(x, values, shape))
    total = sums.sum(0, dtype=torch.float64)
    return dx, *parameter_gradients(total, values, input_scale, output_scale)


def _constants(x: Tensor, values: Tensor, shape: Shape) -> tuple[float, ...]:
    """From n to highest; what does not bound is infinite."""
    dk, grid, none = shape.step(len(values)), (shape.k_min, shape.k_max), (-math.inf, math.inf)
    bounds = (*(grid if shape.clamp else none), *(none if shape.extrapolate or shape.soft else grid))
    return x.numel(), len(values), shape.k_min, dk, 1 / dk, -shape.k_min / dk, *bounds


def shipped(arch: str) -> Iterator[Shipped]:  # noqa: ARG001
    """All that the launchers may choose where the number of elements is a multiple of 16; x may be wider than base."""
    numbers = dict.fromkeys(("k_min", "dk", "rate", "offset", "low", "high", "lowest", "highest"), "fp32")
    sizes = {"n": "i32:16", "knots": "i32", **numbers}
    parameters = {"p_values": "*fp32", "p_in": "*fp32", "p_out": "*fp32"}
    for x, y in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")):
        for soft in (False, True):
            name = f"{'soft' if soft else 'piecewise'}, {x}" + (f" and {y}" if x != y else "")
            for base in (False, True):
                if base or x == y:
                    tensors = {"p_x": f"*{x}", **parameters, "p_base": f"*{y}", "p_y": f"*{y}"}
                    variant = forward_variant(soft, base)
                    yield Shipped(f"y{' + base' * base}, {name}", variant, tensors | sizes)
            tensors = {"p_dy": f"*{y}", "p_x": f"*{x}", **parameters, "p_dx": f"*{x}", "p_sums": "*fp32"}
            yield Shipped(f"dx, {name}", backward_variant(soft), tensors | sizes)

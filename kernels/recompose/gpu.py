"""Triton: all products of a dtype and a class of ranks in one launch; a program owns whole rows, so in place is safe.

A row of a tall basis (a column of a flat one) is read by the program that writes it, and by that one alone; each value
that it writes needs all that it has read of the row.

Sums in float32 run on matrix units, which multiply bfloat16 exactly: T, rounded to float32, is the sum of three
bfloat16 parts of 8 bits each, and float16 values are the sum of two. Sums in float64 run on float64 matrix units
where the card has them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_fast.kernels.gpu import ARCHITECTURES, FEWER_RANKS, RANKS, Shipped, Variant, architecture, compiled_rank
from spectral_fast.kernels.native import CODES
from spectral_fast.kernels.pointers import (
    _INTERPRETED,
    aligned,
    current,
    from_bfloat16,
    is_aligned,
    load,
    pointer,
    store,
    table,
)

if TYPE_CHECKING:
    from spectral_fast.kernels.recompose.product import Product

# Dtypes whose sums may be taken in float32; all else is summed in float64.
NARROW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Up to which three parts of a transform fit on chip, and two of the basis.
RESIDENT_RANK = {torch.bfloat16: 64, torch.float16: 32}
TILES = 16  # that a program of `resident_kernel` multiplies by the transform it has read


@triton.jit
def transform_kernel(p_transforms, p_scaled, W, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """T, zero beyond (k, r), of each product: (products, W, W) float64, or if SPLIT (products, 3, W, W) bfloat16."""
    i_product = tl.program_id(1).to(tl.int64)
    p = p_transforms + 7 * i_product
    transform = tl.load(p).to(tl.pointer_type(tl.float64))
    scale = tl.load(p + 3).to(tl.pointer_type(tl.float64))
    e = tl.program_id(0) * 1024 + tl.arange(0, 1024)  # (1024,)
    i, j = e // W, e % W
    mask = (i < tl.load(p + 5)) & (j < tl.load(p + 6))
    t = tl.load(transform + i * tl.load(p + 1) + j * tl.load(p + 2), mask=mask, other=0.0)
    t *= tl.load(scale + j * tl.load(p + 4), mask=mask, other=0.0)
    if SPLIT:
        rest = t.to(tl.float32)
        for part in tl.static_range(3):
            # Exact, whether it truncates or rounds: 24 bits in three times 8.
            high = rest.to(tl.bfloat16)
            tl.store(p_scaled + (3 * i_product + part) * W * W + e, high, mask=e < W * W)
            rest -= high.to(tl.float32)
    else:
        tl.store(p_scaled + i_product * W * W + e, t, mask=e < W * W)


@triton.jit
def dot(x, t, b_sum, FLAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """b_sum + x t, or + t x if FLAT: exact products of bfloat16, summed in float32, or all in float64."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        x, t = from_bfloat16(x), from_bfloat16(t)
    return tl.dot(t, x, b_sum, input_precision="ieee") if FLAT else tl.dot(x, t, b_sum, input_precision="ieee")


@triton.jit
def split_dot(x, t_0, t_1, t_2, b_sum, FLAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same with t = t_0 + t_1 + t_2, and x of bfloat16 or float16; small terms first."""
    if x.dtype == tl.float16:
        high = x.to(tl.float32).to(tl.bfloat16)
        low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        # Without low · t_2, which is below a roundoff of the whole.
        b_sum = dot(high, t_1, dot(low, t_1, dot(high, t_2, b_sum, FLAT), FLAT), FLAT)
        b_sum = dot(high, t_0, dot(low, t_0, b_sum, FLAT), FLAT)
    else:
        b_sum = dot(x, t_0, dot(x, t_1, dot(x, t_2, b_sum, FLAT), FLAT), FLAT)
    return b_sum


@triton.jit
def resident_kernel(  # type: ignore[no-untyped-def]
    p_products, p_scaled, p_finite,
    FLAT: tl.constexpr, TYPE: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums in float32, of a basis and an out of TYPE, by a transform that stays on chip for TILES tiles."""
    i_product = tl.program_id(1).to(tl.int64)
    p = p_products + 8 * i_product
    length = tl.load(p + 2)
    first = tl.program_id(0).to(tl.int64) * (ROWS * TILES)
    if first >= length:
        return
    basis, out = pointer(tl.load(p), TYPE), tl.load(p + 1)
    k, r = tl.load(p + 3), tl.load(p + 4)
    i = tl.arange(0, W)
    o_t = (i[None, :] * W + i[:, None]) if FLAT else (i[:, None] * W + i[None, :])
    p_t = p_scaled + i_product * 3 * W * W + o_t
    t_0, t_1, t_2 = tl.load(p_t), tl.load(p_t + W * W), tl.load(p_t + 2 * W * W)  # (W, W), transposed if FLAT
    ok = first >= 0
    for at in range(first, tl.minimum(first + ROWS * TILES, length), ROWS):
        o_l = at + tl.arange(0, ROWS)  # (ROWS,) int64
        if FLAT:
            n = tl.multiple_of(length, 8)
            o_x = i[:, None].to(tl.int64) * n + o_l[None, :]  # (W, ROWS)
            m_x, m_y = (i < k)[:, None] & (o_l < n)[None, :], (i < r)[:, None] & (o_l < n)[None, :]
            o_y = o_x
        else:
            k, r = tl.multiple_of(k, 8), tl.multiple_of(r, 8)
            o_x, o_y = o_l[:, None] * k + i[None, :], o_l[:, None] * r + i[None, :]  # (ROWS, W)
            m_x, m_y = (o_l < length)[:, None] & (i < k)[None, :], (o_l < length)[:, None] & (i < r)[None, :]
        x = tl.load(basis + o_x, mask=m_x, other=0.0)
        y = split_dot(x, t_0, t_1, t_2, tl.zeros(x.shape, tl.float32), FLAT)
        ok &= store(out, o_y, y, m_y, 1 if tl.float16 == TYPE else 0)
    if not ok:
        tl.store(p_finite + tl.load(p + 7), 0)


@triton.jit
def streaming_kernel(  # type: ignore[no-untyped-def]
    p_products, p_scaled, p_finite,
    FLAT: tl.constexpr, TYPE: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """INNER rows of T at a time. TYPE float64: sums in float64, of any dtypes; else as `resident_kernel`."""
    i_product = tl.program_id(1).to(tl.int64)
    p = p_products + 8 * i_product
    length = tl.load(p + 2)
    at = tl.program_id(0).to(tl.int64) * ROWS
    if at >= length:
        return
    basis, out, k, r, code = tl.load(p), tl.load(p + 1), tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
    i = tl.arange(0, W)
    o_l = at + tl.arange(0, ROWS)  # (ROWS,) int64
    y = tl.zeros((W, ROWS) if FLAT else (ROWS, W), tl.float64 if tl.float64 == TYPE else tl.float32)
    for inner in range(0, k, INNER):
        o_k = inner + tl.arange(0, INNER)  # (INNER,)
        if FLAT:
            n = tl.multiple_of(length, 8)
            o_x, mask = o_k[:, None] * n + o_l[None, :], (o_k < k)[:, None] & (o_l < n)[None, :]  # (INNER, ROWS)
            o_t = o_k[None, :] * W + i[:, None]  # (W, INNER)
        else:
            k = tl.multiple_of(k, 8)
            o_x, mask = o_l[:, None] * k + o_k[None, :], (o_l < length)[:, None] & (o_k < k)[None, :]  # (ROWS, INNER)
            o_t = o_k[:, None] * W + i[None, :]  # (INNER, W)
        if tl.float64 == TYPE:
            y = dot(load(basis, o_x, mask, code, tl.float64), tl.load(p_scaled + i_product * W * W + o_t), y, FLAT)
        else:
            x = tl.load(pointer(basis, TYPE) + o_x, mask=mask, other=0.0)
            p_t = p_scaled + i_product * 3 * W * W + o_t
            y = split_dot(x, tl.load(p_t), tl.load(p_t + W * W), tl.load(p_t + 2 * W * W), y, FLAT)
    if FLAT:
        n = tl.multiple_of(length, 8)
        o_y, mask = i[:, None].to(tl.int64) * n + o_l[None, :], (i < r)[:, None] & (o_l < n)[None, :]  # (W, ROWS)
    else:
        r = tl.multiple_of(r, 8)
        o_y, mask = o_l[:, None] * r + i[None, :], (o_l < length)[:, None] & (i < r)[None, :]  # (ROWS, W)
    ok = store(out, o_y, y, mask, tl.load(p + 6) if tl.float64 == TYPE else (1 if tl.float16 == TYPE else 0))
    if not ok:
        tl.store(p_finite + tl.load(p + 7), 0)


def variant(arch: str, dtype: torch.dtype | None, flat: bool, width: int) -> Variant:
    """What multiplies bases of a dtype, in float32, or of any dtype, in float64, by transforms of this padded size."""
    shape = {"FLAT": flat, "TYPE": tl.float64 if dtype is None else NARROW[dtype], "W": width}
    if dtype is None:
        warps = 4 if ARCHITECTURES[arch].float64 else 8
        return Variant(streaming_kernel, {**shape, "ROWS": min(4096 // width, 128), "INNER": 16}, warps)
    if width <= RESIDENT_RANK[dtype]:
        return Variant(resident_kernel, {**shape, "ROWS": 4096 // width, "TILES": TILES})
    rows = 16384 // width if dtype == torch.bfloat16 else min(8192 // width, 64)
    return Variant(streaming_kernel, {**shape, "ROWS": rows, "INNER": 32}, warps=8)


def _ranks(dtype: torch.dtype | None) -> tuple[int, ...]:
    return FEWER_RANKS if dtype == torch.float16 else RANKS


SPLIT, SCALED = (Variant(transform_kernel, {"SPLIT": split}) for split in (True, False))


def recompose(products: Sequence[Product]) -> list[bool]:
    """See the op. One read at the end tells the host which products are finite."""
    devices = defaultdict(list)
    for i, x in enumerate(products):
        devices[x.basis.device].append(i)
    finite = [True] * len(products)
    flags = [(chosen, _on_device([products[i] for i in chosen], device)) for device, chosen in devices.items()]
    for chosen, flag in flags:
        for i, ok in zip(chosen, flag.tolist(), strict=True):
            finite[i] = bool(ok)
    return finite


def _on_device(products: Sequence[Product], device: torch.device) -> Tensor:
    groups = defaultdict(list)
    bases = [aligned(x.basis) for x in products]
    outs = [x.out if is_aligned(x.out) else aligned(torch.zeros_like(x.out)) for x in products]
    for i, (basis, transform, _, out, flat, wide) in enumerate(products):
        narrow = not wide and basis.dtype == out.dtype and basis.dtype in NARROW
        dtype = basis.dtype if narrow else None
        groups[dtype, flat, compiled_rank(max(transform.shape), _ranks(dtype))].append(i)
    finite = torch.ones(len(products), dtype=torch.int32, device=device)
    with current(device):
        for (dtype, flat, width), chosen in groups.items():
            rows, transforms = [], []
            for i in chosen:
                basis, out, (_, t, scale, *_) = bases[i], outs[i], products[i]
                codes = (CODES[basis.dtype], CODES[out.dtype])
                # Zero columns that alignment added to a tall basis meet zero rows of the padded transform.
                shape = (basis.shape[1], *t.shape) if flat else (len(basis), basis.shape[1], out.shape[1])
                rows.append((basis.data_ptr(), out.data_ptr(), *shape, *codes, i))
                transforms.append((t.data_ptr(), *t.stride(), scale.data_ptr(), *scale.stride(), *t.shape))
            shape = (len(chosen), width, width) if dtype is None else (len(chosen), 3, width, width)
            scaled = torch.empty(shape, dtype=torch.float64 if dtype is None else torch.bfloat16, device=device)
            (SCALED if dtype is None else SPLIT).launch(
                (triton.cdiv(width * width, 1024), len(chosen)), table(transforms, device), scaled, width
            )
            chosen_variant = variant(architecture(device), dtype, flat, width)
            step = chosen_variant.constants["ROWS"] * chosen_variant.constants.get("TILES", 1)
            grid = (triton.cdiv(max(row[2] for row in rows), step), len(chosen))
            chosen_variant.launch(grid, table(rows, device), scaled, finite)
    for x, out in zip(products, outs, strict=True):
        if out is not x.out:
            x.out.copy_(out[:, : x.out.shape[1]])
    return finite


def shipped(arch: str) -> Iterator[Shipped]:
    """All that `recompose` may launch."""
    for name, chosen, kind in (("split", SPLIT, "*bf16"), ("scaled", SCALED, "*fp64")):
        yield Shipped(f"transform, {name}", chosen, {"p_transforms": "*i64", "p_scaled": kind, "W": "i32:16"})
    for flat in (False, True):
        for width in RANKS:
            signature = {"p_products": "*i64", "p_scaled": "*fp64", "p_finite": "*i32"}
            name = f"{'flat' if flat else 'tall'}, rank {width}"
            fast = ARCHITECTURES[arch].float64
            yield Shipped(f"float64, {name}", variant(arch, None, flat, width), signature, matrix=fast)
            for dtype in (dtype for dtype in NARROW if width in _ranks(dtype)):
                signature = {"p_products": "*i64", "p_scaled": "*bf16", "p_finite": "*i32"}
                title = f"{str(dtype).removeprefix('torch.')}, {name}"
                yield Shipped(title, variant(arch, dtype, flat, width), signature, matrix=True)

"""Triton: each direction is two kernels, one that forms a projection and one that expands it.

The projection (tokens, r) lies in memory between them as float32 sums over parts of the columns, so that few tokens
still fill the machine; the second kernel adds the parts in order. x, y and dy are read once, out and dx written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_fast.kernels.gpu import Shipped, Variant, architecture, compiled_rank
from spectral_fast.kernels.sensitivity.gpu import TYPES, blocks, on_matrix_units, project, ranks, sum_blocks, upcast

PROGRAMS = 256  # that fill a machine: about two per multiprocessor


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    p_x, p_factor, p_parts, tokens, length, r, part,
    FLAT: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, LENGTH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """parts[i_part] = x (tokens, length) times a factor over the columns of a part; (parts, tokens, r) float32."""
    i_part = tl.program_id(1)
    o_token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # (TOKENS,)
    m_token = o_token < tokens
    begin = i_part * part
    end = min(begin + part, length)
    b_p = project(p_x, p_factor, o_token, m_token, length, begin, end, length, r, FLAT, WIDE, LENGTH, R)  # (TOKENS, R)
    o_r = tl.arange(0, R)[None, :]
    tl.store(p_parts + (i_part * tokens + o_token)[:, None] * r + o_r, b_p, mask=m_token[:, None] & (o_r < r))


@triton.jit(do_not_specialize=["tokens", "parts"])
def expand_kernel(
    p_parts, p_s, p_factor, p_y, p_p, p_out, p_blocks, p_sums, scaling, tokens, length, r, parts, share,
    BACKWARD: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, LENGTH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A share of the columns of out (tokens, length) for a block of tokens of one segment.

    Forward: p = the sum of its parts, out = y + scaling (p ⊙ s) Uᵀ, with U (length, r). Backward: q = the sum of its
    parts, out = scaling (q ⊙ s) Vᵀ, with Vᵀ (r, length), and sums[i_block] = Σ p ⊙ q.
    """
    i_block, i_share = tl.program_id(0), tl.program_id(1)
    p_block = p_blocks + 3 * i_block
    o_token = tl.load(p_block)[None] + tl.arange(0, TOKENS)  # (TOKENS,) int64
    m_token = (o_token < tl.load(p_block + 1))[:, None]  # (TOKENS, 1)
    o_r = tl.arange(0, R)  # (R,)
    m_r = o_r < r
    m_p = m_token & m_r[None, :]
    o_p = o_token[:, None] * r + o_r[None, :]  # (TOKENS, R)
    p_part = p_parts + o_p
    b_p = tl.zeros((TOKENS, R), tl.float32)
    for _ in range(parts):
        b_p += tl.load(p_part, mask=m_p, other=0.0)
        p_part += tokens.to(tl.int64) * r
    if i_share == 0:
        if BACKWARD:
            b_product = b_p * tl.load(p_p + o_p, mask=m_p, other=0.0).to(tl.float32)
            tl.store(p_sums + i_block.to(tl.int64) * r + o_r, tl.sum(b_product, 0), mask=m_r)
        else:
            tl.store(p_p + o_p, b_p.to(p_p.dtype.element_ty), mask=m_p)
    b_s = tl.load(p_s + tl.load(p_block + 2) * r + o_r, mask=m_r, other=0.0)  # (R,)
    b_p = (b_p * (scaling * b_s)[None, :]).to(p_out.dtype.element_ty)
    if WIDE:
        b_p = b_p.to(tl.float32)
    for first in range(i_share * share, min((i_share + 1) * share, length), LENGTH):
        o = first + tl.arange(0, LENGTH)[None, :]  # (1, LENGTH)
        if BACKWARD:
            p_tile = p_factor + o_r[:, None].to(tl.int64) * length + o
        else:
            p_tile = p_factor + o.to(tl.int64) * r + o_r[:, None]
        b_factor = tl.load(p_tile, mask=m_r[:, None] & (o < length), other=0.0)  # (R, LENGTH)
        m_out = m_token & (o < length)
        o_out = o_token[:, None] * length + o
        if not BACKWARD:  # asked for before the product, and there after it
            b_y = tl.load(p_y + o_out, mask=m_out, other=0.0)  # (TOKENS, LENGTH)
        if WIDE:
            b_factor = b_factor.to(tl.float32)
        b_out = tl.dot(b_p, b_factor, input_precision="ieee")  # (TOKENS, LENGTH)
        if not BACKWARD:
            b_out += b_y.to(tl.float32)
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


def project_variant(arch: str, dtype: torch.dtype, rank: int, backward: bool) -> Variant:
    """What forms x V, or dy U."""
    narrow = on_matrix_units(dtype)
    constants = {
        "FLAT": not backward,
        "WIDE": upcast(dtype),
        "TOKENS": 64 if narrow else 32,
        "LENGTH": 64 if narrow else 32,
        "R": rank,
    }
    # On sm_100 the sums are in tensor memory, and 8 warps of 64 registers spill.
    warps = 4 if rank <= (128 if arch == "sm_100" else 64) else 8
    return Variant(project_kernel, constants, warps=warps, stages=3 if narrow and arch != "gfx942" else 2)


def expand_variant(arch: str, dtype: torch.dtype, rank: int, backward: bool) -> Variant:  # noqa: ARG001
    """What forms out and p, or dx and the sums of p ⊙ q."""
    narrow = on_matrix_units(dtype)
    constants = {
        "BACKWARD": backward,
        "WIDE": upcast(dtype),
        "TOKENS": 64 if narrow else 16,
        "LENGTH": 64 if narrow else 32,
        "R": rank,
    }
    return Variant(expand_kernel, constants, warps=8 if narrow and rank > 64 else 4, stages=2)


def parts(tokens: int, length: int, other: int, r: int, itemsize: int) -> int:
    """How many parts the columns of x (tokens, length) are cut into: as many as fill the machine and cost little.

    The traffic of the parts, written and read in float32, stays below a twelfth of what must be moved: x, the factors,
    and at least one matrix of the `other` length; a single part is free to exceed it.
    """
    wanted = PROGRAMS // max(1, triton.cdiv(tokens, 64))
    least = ((tokens + r) * (length + other)) * itemsize
    affordable = least // max(1, 12 * 8 * tokens * r)
    return max(1, min(wanted, affordable, triton.cdiv(length, 256)))


def forward(
    x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The backend's call."""
    y, p = y.contiguous(), x.new_empty(len(x), len(vh))
    out = torch.empty_like(y)
    _launch(x, y, vh, u, s, p, out, scaling, starts, backward=False)
    return out, p


def backward(
    dy: Tensor, p: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, starts: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The backend's call; without dx the second kernel has no columns to fill."""
    dx = dy.new_empty(len(dy), vh.shape[1] if wanted else 0)
    sums, firsts = _launch(
        dy, dx, u, vh if wanted else vh[:, :0], s, p.contiguous(), dx, scaling, starts, backward=True
    )
    g = sum_blocks(sums[None], firsts, scaling)[0].view(s.shape).to(s.dtype)
    return dx if wanted else dx.view(0, vh.shape[1]), g


def _launch(
    x: Tensor, y: Tensor, first: Tensor, second: Tensor, s: Tensor, p: Tensor, out: Tensor, scaling: float,
    starts: Tensor | None, *, backward: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both kernels of a direction; returns the sums of each block and the first block of each segment."""
    x, first, second, s = x.contiguous(), first.contiguous(), second.contiguous(), s.float().contiguous()
    (tokens, inner), outer, r = x.shape, out.shape[1], p.shape[1]
    arch, rank = architecture(x.device), compiled_rank(r, ranks(x.dtype))

    variant = project_variant(arch, x.dtype, rank, backward)
    size, length = variant.constants["TOKENS"], variant.constants["LENGTH"]
    number = parts(tokens, inner, outer, r, x.element_size())
    part = triton.cdiv(triton.cdiv(inner, number), length) * length
    projected = x.new_empty(number, tokens, r, dtype=torch.float32)
    variant.launch((triton.cdiv(tokens, size), number), x, first, projected, tokens, inner, r, part)

    variant = expand_variant(arch, x.dtype, rank, backward)
    size, length = variant.constants["TOKENS"], variant.constants["LENGTH"]
    table, firsts = blocks((0, tokens) if starts is None else tuple(starts.tolist()), size, x.device)
    sums = x.new_empty(len(table) if backward else 0, r, dtype=torch.float32)
    shares = max(1, min(triton.cdiv(PROGRAMS, max(1, len(table))), triton.cdiv(outer, length)))
    share = triton.cdiv(triton.cdiv(outer, shares), length) * length
    arguments = (projected, s, second, y, p, out, table, sums, scaling, tokens, outer, r, number, share)
    variant.launch((len(table), shares), *arguments)
    return sums, firsts


def shipped(arch: str) -> Iterator[Shipped]:
    """All that the launchers may choose where m and n are multiples of 16, and r is, or is below."""
    for dtype, t in TYPES.items():
        narrow, x = on_matrix_units(dtype), f"*{t}"
        classes = [(rank, f"R = {rank}", "i32:16") for rank in ranks(dtype)]
        for rank, name, r in [(16, "r < 16", "i32"), *classes] if narrow else classes:
            sizes = {"tokens": "i32", "length": "i32:16", "r": r}
            first = {"p_x": x, "p_factor": x, "p_parts": "*fp32", **sizes, "part": "i32:16"}
            tables = {"p_blocks": "*i64", "p_sums": "*fp32", "scaling": "fp32"}
            second = {"p_parts": "*fp32", "p_s": "*fp32", "p_factor": x, "p_y": x, "p_p": x, "p_out": x, **tables}
            second |= {**sizes, "parts": "i32", "share": "i32:16"}
            for backward in (False, True):
                projected, expanded = ("dy U", "dx and g") if backward else ("x V", "out")
                variant = project_variant(arch, dtype, rank, backward)
                yield Shipped(f"{projected}, {t}, {name}", variant, first, narrow)
                variant = expand_variant(arch, dtype, rank, backward)
                yield Shipped(f"{expanded}, {t}, {name}", variant, second, narrow)

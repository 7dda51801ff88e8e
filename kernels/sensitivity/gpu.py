"""Triton: the sums over the tokens of a segment, of projections that are there or are formed on the way.

Two stages, so that the order of a sum depends on its segment alone: each segment is cut into blocks of tokens, a
program leaves the sum of its block, and a second kernel adds the blocks of each segment in order.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_fast.kernels import pointers
from spectral_fast.kernels.gpu import FEWER_RANKS, INTERPRETED, Shipped, Variant, architecture, compiled_rank
from spectral_fast.kernels.sensitivity.module import Module

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
TOKENS = 512  # a block of `products_kernel`


class Blocks(NamedTuple):
    """The tokens of all segments, cut into blocks that no segment shares.

    Attributes:
        table: first token, last token + 1 and segment of each block, (blocks, 3) int64.
        firsts: first block of each segment and, last, the number of blocks, (segments + 1,) int64.
    """

    table: Tensor
    firsts: Tensor


@functools.lru_cache(maxsize=64)
def _blocks(starts: tuple[int, ...], size: int, device: torch.device, stream: int) -> Blocks:  # noqa: ARG001
    edges = np.array(starts, np.int64)
    counts = -(-np.diff(edges) // size)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    segment = np.repeat(np.arange(len(counts)), counts)
    begin = edges[segment] + (np.arange(firsts[-1]) - firsts[segment]) * size
    end = np.minimum(begin + size, edges[segment + 1])
    table = np.stack([begin, end, segment], axis=1)
    return Blocks(torch.from_numpy(table).to(device), torch.from_numpy(firsts).to(device))


def blocks(starts: tuple[int, ...], size: int, device: torch.device) -> Blocks:
    """Blocks of at most `size` tokens. Kept: a forward and backward pass asks for the same ones in every module.

    Each stream has its own: memory that is given up goes to the stream that it was made on.
    """
    return _blocks(starts, size, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


@triton.jit
def products_kernel(p_p, p_q, p_blocks, p_sums, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums[i_block] = Σ p ⊙ q over the tokens of a block, for COLUMNS of the r columns."""
    i_block = tl.program_id(0)
    o_r = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
    begin, end = tl.load(p_blocks + 3 * i_block), tl.load(p_blocks + 3 * i_block + 1)
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        o_token = first + tl.arange(0, ROWS)  # (ROWS,) int64
        mask = (o_token < end)[:, None] & (o_r < r)[None, :]
        o = o_token[:, None] * r + o_r[None, :]
        b_p = tl.load(p_p + o, mask=mask, other=0.0).to(tl.float32)  # (ROWS, COLUMNS)
        b_q = tl.load(p_q + o, mask=mask, other=0.0).to(tl.float32)  # (ROWS, COLUMNS)
        b_sum += b_p * b_q
    tl.store(p_sums + i_block.to(tl.int64) * r + o_r, tl.sum(b_sum, 0), mask=o_r < r)


@triton.jit(do_not_specialize=["blocks", "segments"])
def sum_kernel(p_sums, p_firsts, p_out, scaling, blocks, segments, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[i_group, i_segment] = scaling · Σ sums[i_group, block] over the blocks of a segment, in order."""
    i_segment, i_group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_r = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
    begin, end = tl.load(p_firsts + i_segment), tl.load(p_firsts + i_segment + 1)
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        o_block = first + tl.arange(0, ROWS)  # (ROWS,) int64
        mask = (o_block < end)[:, None] & (o_r < r)[None, :]
        b_sum += tl.load(p_sums + (i_group * blocks + o_block)[:, None] * r + o_r[None, :], mask=mask, other=0.0)
    o = (i_group * segments + i_segment) * r + o_r
    tl.store(p_out + o, scaling * tl.sum(b_sum, 0), mask=o_r < r)


@triton.jit
def project(
    p_x, p_factor, o_token, m_token, stride, begin, end, length, r,
    FLAT: tl.constexpr, WIDE: tl.constexpr, LENGTH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Columns begin to end of x (…, length), rows o_token, times a factor (length, r), or (r, length) if FLAT."""
    o_r = tl.arange(0, R)[None, :]  # (1, R)
    p_row = p_x + o_token[:, None] * stride  # (tokens, 1)
    b_sum = tl.zeros((o_token.shape[0], R), tl.float32)
    for first in range(begin, end, LENGTH):
        o = first + tl.arange(0, LENGTH)  # (LENGTH,)
        m = o < length
        b_x = tl.load(p_row + o[None, :], mask=m_token[:, None] & m[None, :], other=0.0)  # (tokens, LENGTH)
        if FLAT:
            p_block = p_factor + o_r.to(tl.int64) * length + o[:, None]
        else:
            p_block = p_factor + o[:, None].to(tl.int64) * r + o_r
        b_factor = tl.load(p_block, mask=m[:, None] & (o_r < r), other=0.0)  # (LENGTH, R)
        if WIDE:
            b_x, b_factor = b_x.to(tl.float32), b_factor.to(tl.float32)
        b_sum = tl.dot(b_x, b_factor, b_sum, input_precision="ieee")
    return b_sum


@triton.jit(do_not_specialize=["blocks"])
def grouped_kernel(
    p_modules, p_blocks, p_sums, blocks,
    TYPE: tl.constexpr, FACTOR: tl.constexpr, BASIS: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, LENGTH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """sums[i_module, i_block] = Σ (x V) ⊙ (dy U) over the tokens of a block; a row of the table is one module."""
    i_block, i_module = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_module = p_modules + 9 * i_module
    p_x, p_dy = tl.load(p_module), tl.load(p_module + 1)
    stride_x, stride_dy = tl.load(p_module + 2), tl.load(p_module + 3)
    p_v, p_u = tl.load(p_module + 4), tl.load(p_module + 5)
    n, m, r = tl.load(p_module + 6), tl.load(p_module + 7), tl.load(p_module + 8)
    # What the launcher has seen to, and a table does not tell the compiler.
    stride_x, stride_dy = tl.multiple_of(stride_x, 8), tl.multiple_of(stride_dy, 8)
    n, m, r = tl.multiple_of(n, 8), tl.multiple_of(m, 8), tl.multiple_of(r, 8)
    x = tl.multiple_of(p_x.to(tl.pointer_type(TYPE)), 16)
    dy = tl.multiple_of(p_dy.to(tl.pointer_type(TYPE)), 16)
    v = tl.multiple_of(p_v.to(tl.pointer_type(FACTOR)), 16)
    u = tl.multiple_of(p_u.to(tl.pointer_type(FACTOR)), 16)
    o_token = tl.load(p_blocks + 3 * i_block) + tl.arange(0, TOKENS)  # (TOKENS,) int64
    m_token = o_token < tl.load(p_blocks + 3 * i_block + 1)
    b_p = project(x, v, o_token, m_token, stride_x, 0, n, n, r, not BASIS, WIDE, LENGTH, R)  # (TOKENS, R)
    b_q = project(dy, u, o_token, m_token, stride_dy, 0, m, m, r, False, WIDE, LENGTH, R)  # (TOKENS, R)
    # Rows that are masked and columns beyond r are zero in both.
    tl.store(p_sums + (i_module * blocks + i_block) * R + tl.arange(0, R), tl.sum(b_p * b_q, 0))


PRODUCTS = Variant(products_kernel, {"ROWS": 64, "COLUMNS": 32})
SUM = Variant(sum_kernel, {"ROWS": 64, "COLUMNS": 32})


def upcast(dtype: torch.dtype) -> bool:
    """Whether products must be formed from float32 values: Triton's interpreter computes those of bfloat16 wrongly."""
    return INTERPRETED and dtype == torch.bfloat16


def on_matrix_units(dtype: torch.dtype, basis: bool = False) -> bool:
    """Whether products of x of this dtype, and of float32 factors in a LoRA basis, are formed by them."""
    return dtype != torch.float32 and not basis


def ranks(dtype: torch.dtype, basis: bool = False) -> tuple[int, ...]:
    """The ranks that are compiled: masked columns of a factor cost products, of which there is room, and no traffic."""
    if not on_matrix_units(dtype, basis):
        return (64, 256)
    return FEWER_RANKS if dtype == torch.float16 else (16, 64, 128, 256)


def grouped_variant(arch: str, dtype: torch.dtype, rank: int, basis: bool) -> Variant:
    """What sums the products of modules whose rank is padded to `rank`."""
    narrow = on_matrix_units(dtype, basis)
    constants = {
        "TYPE": TYPES[dtype],
        "FACTOR": tl.float32 if basis else TYPES[dtype],
        "BASIS": basis,
        "WIDE": basis or upcast(dtype),
        "TOKENS": {16: 64, 64: 64, 128: 64, 256: 32}[rank] if narrow else {64: 32, 256: 16}[rank],
        "LENGTH": 64 if narrow else 32,
        "R": rank,
    }
    # Three stages of rank 256 need 72 KiB of shared memory.
    stages = 3 if narrow and arch != "gfx942" else 2
    return Variant(grouped_kernel, constants, warps=4 if rank <= 64 else 8, stages=stages)


def segment_products(p: Tensor, q: Tensor, starts: Tensor) -> Tensor:
    """The backend's call."""
    p, q = p.contiguous(), q.contiguous()
    table, firsts = blocks(tuple(starts.tolist()), TOKENS, p.device)
    r = p.shape[1]
    sums = p.new_empty(len(table), r, dtype=torch.float32)
    PRODUCTS.launch((len(table), triton.cdiv(r, PRODUCTS.constants["COLUMNS"])), p, q, table, sums, r)
    return sum_blocks(sums[None], firsts)[0]


def sum_blocks(sums: Tensor, firsts: Tensor, scaling: float = 1.0) -> Tensor:
    """Scaled sums over the blocks of each segment: sums (groups, blocks, r) -> (groups, segments, r)."""
    groups, number, r = sums.shape
    segments = len(firsts) - 1
    out = sums.new_empty(groups, segments, r)
    grid = (segments, triton.cdiv(r, SUM.constants["COLUMNS"]), groups)
    SUM.launch(grid, sums, firsts, out, scaling, number, segments, r)
    return out


def grouped_products(modules: Sequence[Module], starts: Tensor) -> list[Tensor]:
    """The backend's call: one launch for all modules of one dtype, form and padded rank."""
    launches = defaultdict(list)
    for i, (x, _, u, vh) in enumerate(modules):
        basis = u.dtype != x.dtype or (x.dtype == torch.float32 and not vh.is_contiguous())
        launches[x.dtype, compiled_rank(u.shape[1], ranks(x.dtype, basis)), basis].append(i)
    out: dict[int, Tensor] = {}
    for (dtype, rank, basis), group in launches.items():
        device = modules[group[0]].x.device
        variant = grouped_variant(architecture(device), dtype, rank, basis)
        table, firsts = blocks(tuple(starts.tolist()), variant.constants["TOKENS"], device)
        ready = [_ready(modules[i], basis) for i in group]  # kept until after the launch
        rows = [
            [
                *(x.data_ptr(), dy.data_ptr(), x.stride(0), dy.stride(0)),
                *(v.data_ptr(), u.data_ptr(), x.shape[1], *u.shape),
            ]
            for x, dy, u, v in ready
        ]
        sums = torch.empty(len(group), len(table), rank, device=device)
        variant.launch((len(table), len(group)), pointers.table(rows, device), table, sums, len(table))
        for i, g in zip(group, sum_blocks(sums, firsts), strict=True):
            out[i] = g[:, : modules[i].u.shape[1]]
    return [out[i] for i in range(len(modules))]


def _ready(module: Module, basis: bool) -> Module:
    """As the kernel reads it: rows in whole vectors; in a LoRA basis T_A for vh, and both factors in float32."""
    x, dy, u, vh = module
    if basis:
        u, vh = u.float(), vh.float().mT
    return Module(_aligned(x), _aligned(dy), _aligned(u, True), _aligned(vh, True))


def _aligned(x: Tensor, rows: bool = False) -> Tensor:
    """A matrix whose rows start and end at multiples of 8 values: itself wherever it is one, else padded by zeros."""
    pad = (0, -x.shape[1] % 8, 0, -x.shape[0] % 8 if rows else 0)
    if any(pad):
        return torch.nn.functional.pad(x, pad)
    fits = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and (x.is_contiguous() or not rows)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def shipped(arch: str) -> Iterator[Shipped]:
    """All that the launchers may choose."""
    tables = {"p_blocks": "*i64", "p_sums": "*fp32"}
    for kind in TYPES.values():
        yield Shipped(f"products, {kind}", PRODUCTS, {"p_p": f"*{kind}", "p_q": f"*{kind}", **tables, "r": "i32:16"})
    sizes = {"scaling": "fp32", "blocks": "i32", "segments": "i32", "r": "i32:16"}
    yield Shipped("sum of blocks", SUM, {"p_sums": "*fp32", "p_firsts": "*i64", "p_out": "*fp32", **sizes})
    for (dtype, kind), basis in itertools.product(TYPES.items(), (False, True)):
        for rank in ranks(dtype, basis):
            variant = grouped_variant(arch, dtype, rank, basis)
            name = f"grouped, {kind}, R = {rank}" + ", LoRA basis" * basis
            yield Shipped(
                name, variant, {"p_modules": "*i64", **tables, "blocks": "i32"}, on_matrix_units(dtype, basis)
            )

"""Triton: one pass over the logits, and convolutions without transforms or atomics.

Sums are in an order that depends on the sizes alone: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_fast.kernels.gpu import Shipped, Variant
from spectral_fast.kernels.head_sketch.reference import sparse_errors
from spectral_fast.kernels.sensitivity.gpu import TYPES, blocks, sum_blocks

BYTES = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}  # that differ when they are float32
TOKENS = 4  # that a program of `convolve_kernel` sums


@triton.jit
def ordered(x):
    """Float32 as uint32 in the same order; −0 is 0."""
    i = (x + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(i >= 0x80000000, i ^ 0xFFFFFFFF, i | 0x80000000)


@triton.jit
def top_kernel(
    p_logits, p_labels, p_lse, p_gold, p_values, p_ids, vocabulary, top, BLOCK: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """Of a row: logsumexp, logit at the label, and the `top` largest in the order of their ids.

    The least of these is found by its bytes, the highest first, each by a histogram: what is read depends on sizes
    alone. BYTES are as many as differ in a logit's type, the rest is the same in all logits of one sign.
    """
    i_row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + i_row)
    if label != -100:
        p_row = p_logits + i_row * vocabulary
        b_most = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
        b_total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            o_id = first + tl.arange(0, BLOCK)  # (BLOCK,)
            b_x = tl.load(p_row + o_id, mask=o_id < vocabulary, other=float("-inf")).to(tl.float32)  # (BLOCK,)
            b_found = tl.maximum(b_most, b_x)
            b_total = b_total * tl.exp(b_most - b_found) + tl.exp(b_x - b_found)
            b_most = b_found
        largest = tl.max(b_most)
        tl.store(p_lse + i_row, largest + tl.log(tl.sum(b_total * tl.exp(b_most - largest))))
        tl.store(p_gold + i_row, tl.load(p_row + label, mask=label >= 0, other=float("-inf")).to(tl.float32))

        o_byte = tl.arange(0, 256)
        least = 0  # the bytes so far of the `top`-th largest
        wanted = top  # how many of those that begin like it
        for i in tl.static_range(BYTES):
            b_count = tl.zeros((256,), tl.int32)
            for first in range(0, vocabulary, BLOCK):
                o_id = first + tl.arange(0, BLOCK)
                b_x = tl.load(p_row + o_id, mask=o_id < vocabulary, other=0.0).to(tl.float32)
                b_key = (ordered(b_x) >> (32 - 8 * BYTES)).to(tl.int64) >> (8 * (BYTES - 1 - i))
                m_alike = (o_id < vocabulary) & ((b_key >> 8) == least)
                b_count += tl.histogram((b_key & 0xFF).to(tl.int32), 256, mask=m_alike)
            b_from = tl.sum(b_count) - tl.cumsum(b_count) + b_count  # with this byte or a larger one
            byte = tl.sum((b_from >= wanted).to(tl.int32)) - 1
            wanted -= tl.sum(tl.where(o_byte > byte, b_count, 0))
            least = least * 256 + byte.to(tl.int64)

        stored = 0
        seen = 0
        for first in range(0, vocabulary, BLOCK):
            o_id = first + tl.arange(0, BLOCK)
            b_x = tl.load(p_row + o_id, mask=o_id < vocabulary, other=0.0).to(tl.float32)
            b_key = (ordered(b_x) >> (32 - 8 * BYTES)).to(tl.int64)
            m_equal = (b_key == least) & (o_id < vocabulary)
            b_equal = seen + tl.cumsum(m_equal.to(tl.int32))
            m_kept = ((b_key > least) & (o_id < vocabulary)) | (m_equal & (b_equal <= wanted))
            o_out = stored + tl.cumsum(m_kept.to(tl.int32)) - 1
            tl.store(p_values + i_row * top + o_out, b_x, mask=m_kept)
            tl.store(p_ids + i_row * top + o_out, o_id.to(tl.int64), mask=m_kept)
            seen += tl.sum(m_equal.to(tl.int32))
            stored += tl.sum(m_kept.to(tl.int32))


@triton.jit
def count_kernel(p_hidden, p_order, p_signs, p_starts, p_counts, features, m, COLUMNS: tl.constexpr):
    """counts[t, j] = Σ sign_h(i) h_ti over the features i of bucket j, which `order` lists from starts[j] on."""
    i_token = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
    b_start = tl.load(p_starts + o_m, mask=o_m < m, other=0)
    b_end = tl.load(p_starts + o_m + 1, mask=o_m < m, other=0)
    b_sum = tl.zeros((COLUMNS,), tl.float32)
    for i in range(0, tl.max(b_end - b_start).to(tl.int32)):
        o = b_start + i
        mask = o < b_end
        o_feature = tl.load(p_order + o, mask=mask, other=0)
        b_h = tl.load(p_hidden + i_token * features + o_feature, mask=mask, other=0.0).to(tl.float32)
        b_sum += b_h * tl.load(p_signs + o, mask=mask, other=0.0)
    tl.store(p_counts + i_token * m + o_m, b_sum, mask=o_m < m)


@triton.jit(do_not_specialize=["tokens", "width"])
def convolve_kernel(
    p_counts, p_errors, p_buckets, p_sums, tokens, width, m,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums[i_run, i] = Σ of errors[t, w] counts[t, (i − buckets[t, w]) mod m] over the tokens t of a run, and w."""
    i_run = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
    b_sum = tl.zeros((COLUMNS,), tl.float32)
    for i in range(0, TOKENS):
        i_token = i_run * TOKENS + i
        b_token = tl.zeros((COLUMNS,), tl.float32)
        for w in range(0, width):
            m_token = i_token < tokens
            error = tl.load(p_errors + i_token * width + w, mask=m_token, other=0.0)
            bucket = tl.load(p_buckets + i_token * width + w, mask=m_token, other=0)
            b_error = tl.zeros((COLUMNS,), tl.float32) + error
            o = tl.where(o_m < bucket, o_m - bucket + m, o_m - bucket)
            # What is left out has no error, and states that may be anything.
            b_count = tl.load(p_counts + i_token * m + o, mask=(o_m < m) & (b_error != 0.0), other=0.0)
            b_token += b_error * b_count
        b_sum += b_token
    tl.store(p_sums + i_run * m + o_m, b_sum, mask=o_m < m)


COUNT = Variant(count_kernel, {"COLUMNS": 256})


TOPS = {dtype: Variant(top_kernel, {"BLOCK": 2048, "BYTES": number}, warps=8) for dtype, number in BYTES.items()}
CONVOLVE = Variant(convolve_kernel, {"TOKENS": TOKENS, "COLUMNS": 256})


def top_logits(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend's call."""
    logits, labels = logits.contiguous(), labels.contiguous()
    rows, vocabulary = logits.shape
    lse, gold = (logits.new_zeros(rows, dtype=torch.float32) for _ in range(2))
    values, ids = logits.new_zeros(rows, top_k, dtype=torch.float32), labels.new_zeros(rows, top_k)
    TOPS[logits.dtype].launch((rows,), logits, labels, lse, gold, values, ids, vocabulary, top_k)
    return lse, gold, values, ids


def tensor_sketch(
    hidden: Tensor, logsumexp: Tensor, gold: Tensor, values: Tensor, ids: Tensor, labels: Tensor,
    bucket_h: Tensor, sign_h: Tensor, bucket_e: Tensor, sign_e: Tensor, m: int,
) -> Tensor:  # fmt: skip
    """The backend's call."""
    errors, ids = sparse_errors(logsumexp, gold, values, ids, labels)
    errors, buckets, hidden = (errors * sign_e[ids]).contiguous(), bucket_e[ids].contiguous(), hidden.contiguous()
    (tokens, features), width = hidden.shape, errors.shape[1]
    in_order, order = bucket_h.sort(stable=True)
    starts = torch.searchsorted(in_order, torch.arange(m + 1, device=hidden.device, dtype=in_order.dtype))
    counts = hidden.new_empty(tokens, m, dtype=torch.float32)
    parts = triton.cdiv(m, COUNT.constants["COLUMNS"])
    COUNT.launch((tokens, parts), hidden, order, sign_h[order], starts, counts, features, m)
    table, firsts = blocks((0, tokens), TOKENS, hidden.device)
    sums = hidden.new_empty(len(table), m, dtype=torch.float32)
    CONVOLVE.launch((len(table), parts), counts, errors, buckets, sums, tokens, width, m)
    return sum_blocks(sums[None], firsts)[0, 0]


def shipped(arch: str) -> Iterator[Shipped]:
    """All that the launchers may choose."""
    del arch
    for dtype, kind in TYPES.items():
        outputs = {"p_lse": "*fp32", "p_gold": "*fp32", "p_values": "*fp32", "p_ids": "*i64"}
        sizes = {"vocabulary": "i32:16", "top": "i32:16"}
        signature = {"p_logits": f"*{kind}", "p_labels": "*i64", **outputs, **sizes}
        yield Shipped(f"largest logits, {kind}", TOPS[dtype], signature)
        tables = {"p_order": "*i64", "p_signs": "*fp32", "p_starts": "*i64", "p_counts": "*fp32"}
        sizes = {"features": "i32:16", "m": "i32:16"}
        yield Shipped(f"CountSketch, {kind}", COUNT, {"p_hidden": f"*{kind}", **tables, **sizes})
    pointers = {"p_counts": "*fp32", "p_errors": "*fp32", "p_buckets": "*i32", "p_sums": "*fp32"}
    yield Shipped("convolutions", CONVOLVE, {**pointers, "tokens": "i32", "width": "i32", "m": "i32:16"})

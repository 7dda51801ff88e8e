"""Kernels for the tests of ``benchmarks.codegen``: one that is good, and others each wrong in its own way."""

from __future__ import annotations

import os
from collections.abc import Iterator

import triton
import triton.language as tl

from spectral_fast.kernels.gpu import Shipped, Variant


@triton.jit
def gram(p_x, p_out, tokens, R: tl.constexpr, BLOCK: tl.constexpr):
    """out (R, R) = Σ of a block of tokens xᵀ x, x (tokens, R)."""
    i_r = tl.arange(0, R)
    b_sum = tl.zeros((R, R), tl.float32)
    for o in range(0, tokens, BLOCK):
        i_n = o + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + i_n[:, None] * R + i_r[None, :], mask=i_n[:, None] < tokens, other=0)
        b_sum = tl.dot(tl.trans(b_x), b_x, b_sum, input_precision="ieee")
    tl.store(p_out + i_r[:, None] * R + i_r[None, :], b_sum)


def _gram(name: str, dtype: str, rank: int, *, block: int = 64, warps: int = 4, stages: int = 2) -> Shipped:
    variant = Variant(gram, {"R": rank, "BLOCK": block}, warps, stages)
    return Shipped(name, variant, {"p_x": f"*{dtype}", "p_out": "*fp32", "tokens": "i32:16"}, matrix=True)


KERNELS = {
    "good": _gram("good", "fp16", 64),
    "spilling": _gram("a sum of 512 registers a thread", "fp16", 128, block=16, warps=1),
    "deep": _gram("16 stages of 16 KiB", "fp16", 64, block=128, stages=16),
    "scalar": _gram("float32 has no matrix instruction", "fp32", 16, block=16),
    "unnamed": Shipped("an argument without a type", Variant(gram, {"R": 16, "BLOCK": 16}), {"p_x": "*fp32"}),
}


def shipped(arch: str) -> Iterator[Shipped]:
    """The kernels that the test asks for, on every architecture."""
    del arch
    yield from (KERNELS[name] for name in os.environ["CODEGEN_KERNELS"].split(","))

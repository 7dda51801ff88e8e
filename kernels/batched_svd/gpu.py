"""One-sided Jacobi on a GPU, in Triton: a program holds a matrix on chip until its columns are orthogonal.

G = xᵀ Q for an orthogonal Q that makes the columns of x triangular in the order of their lengths: whatever the
condition of x, four to nine sweeps of rotations G V are then enough. G V = W diag(s), so x = (Q V) diag(s) Wᵀ. Columns
of G, W and V are held as rows.

A program holds half of its columns in `top` and the others in `bottom`, pair beside pair, so that all pairs of a step
are rotated at once and only the bottom moves between steps. Where every top one has met every bottom one, the halves
exchange half of their columns, and so on until all have met. A matrix too large for one program is cut into blocks of
columns: a program lets the columns of two blocks meet, a launch does disjoint pairs of blocks, and nothing is asked
of the host between launches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_fast.kernels.batched_svd import cuda
from spectral_fast.kernels.gpu import ARCHITECTURES, Shipped, Variant, architecture

MAX_RANK = 512
# 4 to 10 are needed for r up to 512.
MAX_SWEEPS = 20
# What `svd_launch` says of each matrix; Status in csrc/cuda/jacobi.cu.
CONVERGED, NOT_FINITE, NOT_CONVERGED = 0, 1, 2


@triton.jit(do_not_specialize=["r"])
def triangular_kernel(p_x, p_order, p_g, p_w, r, R: tl.constexpr, NOISE: tl.constexpr):
    """G = xᵀ Q of one matrix by Householder reflections I - w wᵀ, transposed and padded to (R, R).

    order (batch, r) int64: columns of x in the order in which they are reflected; w (batch, R, R): one in each row.
    """
    i_matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, R)
    inside = (i < r)[:, None] & (i < r)[None, :]
    o_matrix = i_matrix * R * R
    g = tl.load(p_x + i_matrix * r * r + i[:, None] * r + i[None, :], mask=inside, other=0.0)  # (R, R)
    for k in range(0, r - 1):
        i_x = tl.load(p_order + i_matrix * r + k)
        x = tl.sum(tl.where((i == i_x)[None, :], g, 0.0), 1)  # (R,)
        x = tl.where(i >= k, x, 0.0)
        length = tl.sqrt(tl.sum(x * x, 0))
        first = tl.sum(tl.where(i == k, x, 0.0), 0)
        x += tl.where(i == k, tl.where(first < 0, -length, length), 0.0)
        # What is shorter than the noise stays as it is: its square may have underflowed.
        square = tl.maximum(length * (length + tl.abs(first)), NOISE * NOISE)
        w = tl.where(length > NOISE, x * tl.rsqrt(square), 0.0)  # (R,)
        tl.store(p_w + o_matrix + k * R + i, w)
        g -= w[:, None] * tl.sum(w[:, None] * g, 0)[None, :]
    # Padding: columns orthogonal to all others, and known by their elements below row r.
    g = tl.where(inside, g, tl.where(i[:, None] == i[None, :], NOISE, 0.0))
    tl.store(p_g + o_matrix + i[:, None] * R + i[None, :], g)


@triton.jit
def _revive(g, i_column, r, seed, NOISE: tl.constexpr):
    """Replaces columns that vanished by noise far below rounding, which the rotations make orthogonal to all others.

    So null vectors come out like any others. g is (C, R), i_column (C,).
    """
    R: tl.constexpr = g.shape[1]
    i_row = tl.arange(0, R)[None, :]
    h = ((seed * R + i_column[:, None]) * R + i_row).to(tl.uint32)  # (C, R)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = (h ^ (h >> 16)) >> 8
    random = (h.to(tl.float32) * 2.0**-23 - 1.0).to(g.dtype) * NOISE
    vanished = tl.sqrt(tl.sum(g * g, 1)) < NOISE * 2.0**-10  # (C,)
    return tl.where(vanished[:, None], tl.where(i_row < r, random, 0.0), g), vanished.to(tl.int32)


@triton.jit
def _take(x, i):
    """The rows i (C,) of x (C, W)."""
    return tl.gather(x, tl.broadcast_to(i[:, None], x.shape), 0)


@triton.jit
def _meet(top, bottom, v_top, v_bottom, i, count, rotated, TOLERANCE: tl.constexpr):
    """Rotates each column of top (C, R) with the `count` columns of bottom whose index differs in the lowest bits.

    v_top and v_bottom (C, W) go through the same rotations. i is arange(C), count a power of two.
    """
    for m in range(0, count):
        # Anew for each pair: an update would lose what cancellation leaves of a length.
        a = tl.sum(top * top, 1)  # (C,)
        b = tl.sum(bottom * bottom, 1)
        d = tl.sum(top * bottom, 1)
        go = tl.abs(d) > TOLERANCE * tl.sqrt(a) * tl.sqrt(b)
        rotated |= go.to(tl.int32)
        gap = b - a
        cotangent = tl.where(go, gap / tl.where(go, 2 * d, 1.0), 0.0)  # of twice the angle
        size = tl.abs(cotangent)
        near = tl.minimum(size, 2.0**20)  # beyond, the square would not change 1 + size, and may overflow
        hypotenuse = tl.where(size > near, size, tl.sqrt(1 + near * near))
        t = tl.where(go, tl.where(cotangent < 0, -1.0, 1.0) / (size + hypotenuse), 0.0)
        # An approximation: if it makes G's and V's columns longer, then alike.
        c = tl.rsqrt(1 + t * t)
        x, y = c[:, None], (c * t)[:, None]
        top, bottom = x * top - y * bottom, y * top + x * bottom
        v_top, v_bottom = x * v_top - y * v_bottom, y * v_top + x * v_bottom
        step = m ^ ((m + 1) % count)
        bottom, v_bottom = _take(bottom, i ^ step), _take(v_bottom, i ^ step)
    return top, bottom, v_top, v_bottom, rotated


@triton.jit
def _exchange(top, bottom, i, bit):
    """The columns of top whose index has the bit change places with those of bottom that have not."""
    has = ((i & bit) != 0)[:, None]
    return tl.where(has, _take(bottom, i ^ bit), top), tl.where(has, bottom, _take(top, i ^ bit))


@triton.jit
def _sweep(top, bottom, v_top, v_bottom, i, rotated, TOLERANCE: tl.constexpr):
    """Lets all columns of top and bottom (C, R) meet; it leaves them in another order."""
    bit = top.shape[0]
    while bit >= 1:
        if bit < top.shape[0]:
            top, bottom = _exchange(top, bottom, i, bit)
            v_top, v_bottom = _exchange(v_top, v_bottom, i, bit)
        top, bottom, v_top, v_bottom, rotated = _meet(top, bottom, v_top, v_bottom, i, bit, rotated, TOLERANCE)
        bit //= 2
    return top, bottom, v_top, v_bottom, rotated


@triton.jit(do_not_specialize=["r"])
def whole_kernel(
    p_g, p_v, p_busy, r, R: tl.constexpr, TOLERANCE: tl.constexpr, NOISE: tl.constexpr, SWEEPS: tl.constexpr
):
    """Rotations of one matrix per program, until it has converged; v holds the reflections, and then Q V."""
    i_matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, R // 2)
    i_row = tl.arange(0, R)[None, :]
    o_matrix = i_matrix * R * R
    v_top, v_bottom = (
        (i[:, None] == i_row).to(p_v.dtype.element_ty),
        (i[:, None] + R // 2 == i_row).to(p_v.dtype.element_ty),
    )  # (R/2, R)
    for k in range(0, r - 1):
        w_top, w_bottom = tl.load(p_v + o_matrix + k * R + i), tl.load(p_v + o_matrix + k * R + R // 2 + i)  # (R/2,)
        w_top, w_bottom = w_top[:, None], w_bottom[:, None]
        product = tl.sum(w_top * v_top, 0) + tl.sum(w_bottom * v_bottom, 0)  # (R,)
        v_top, v_bottom = v_top - w_top * product[None, :], v_bottom - w_bottom * product[None, :]
    # No warp stores to v before the others have loaded from it.
    tl.debug_barrier()
    o_top = o_matrix + i[:, None] * R + i_row
    o_bottom = o_top + R // 2 * R
    top, bottom = tl.load(p_g + o_top), tl.load(p_g + o_bottom)
    busy = tl.load(p_busy + i_matrix)
    sweep = 0
    while (busy != 0) & (sweep < SWEEPS):
        top, revived_top = _revive(top, i, r, sweep, NOISE)
        bottom, revived_bottom = _revive(bottom, i + R // 2, r, sweep, NOISE)
        top, bottom, v_top, v_bottom, rotated = _sweep(
            top, bottom, v_top, v_bottom, i, revived_top | revived_bottom, TOLERANCE
        )
        busy = tl.max(rotated)
        sweep += 1
    tl.store(p_g + o_top, top)
    tl.store(p_g + o_bottom, bottom)
    tl.store(p_v + o_top, v_top)
    tl.store(p_v + o_bottom, v_bottom)
    tl.store(p_busy + i_matrix, busy)


@triton.jit(do_not_specialize=["r", "sweep", "step"])
def pair_kernel(
    p_g,
    p_v,
    p_busy,
    r,
    sweep,
    step,
    R: tl.constexpr,
    C: tl.constexpr,
    TOLERANCE: tl.constexpr,
    NOISE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Lets the columns of blocks p and p ^ step meet, of C columns each; in step 1 also those within a block.

    busy (sweeps + 1, batch) says whether a matrix needs a sweep.
    """
    i_matrix = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0)
    if tl.load(p_busy + sweep * count + i_matrix) != 0:
        # The pair's number gets a zero where step has its highest bit.
        highest = 1
        while highest * 2 <= step:
            highest *= 2
        pair = tl.program_id(1)
        i_top = (pair // highest) * 2 * highest + pair % highest
        i = tl.arange(0, C)
        i_row = tl.arange(0, R)[None, :]
        column_top, column_bottom = i_top * C + i, (i_top ^ step) * C + i
        p_top = p_g + i_matrix * R * R + column_top[:, None] * R
        p_bottom = p_g + i_matrix * R * R + column_bottom[:, None] * R
        top, bottom = tl.load(p_top + i_row), tl.load(p_bottom + i_row)  # (C, R)
        # The rotations of these 2 C columns: J = [[tt, tb], [bt, bb]].
        j = tl.arange(0, 2 * C)[None, :]
        j_top, j_bottom = (i[:, None] == j).to(top.dtype), (i[:, None] + C == j).to(top.dtype)  # (C, 2 C)
        rotated = tl.zeros((C,), tl.int32)
        if step == 1:
            top, revived_top = _revive(top, column_top, r, sweep, NOISE)
            bottom, revived_bottom = _revive(bottom, column_bottom, r, sweep, NOISE)
            top, bottom, j_top, j_bottom, rotated = _sweep(
                top, bottom, j_top, j_bottom, i, revived_top | revived_bottom, TOLERANCE
            )
        else:
            top, bottom, j_top, j_bottom, rotated = _meet(top, bottom, j_top, j_bottom, i, C, rotated, TOLERANCE)
        if tl.max(rotated) != 0:
            tl.store(p_top + i_row, top)
            tl.store(p_bottom + i_row, bottom)
            tl.store(p_busy + (sweep + 1) * count + i_matrix, 1)
            # (2 C, 2 C), whose rows are in the order of the columns.
            rotation = tl.reshape(tl.permute(tl.join(j_top, j_bottom), (2, 0, 1)), (2 * C, 2 * C))
            column = tl.reshape(tl.permute(tl.join(column_top, column_bottom), (1, 0)), (2 * C,))
            for o_chunk in range(0, R, CHUNK):
                p_chunk = p_v + i_matrix * R * R + column[:, None] * R + o_chunk + tl.arange(0, CHUNK)[None, :]
                v = tl.load(p_chunk)  # (2 C, CHUNK)
                tl.store(p_chunk, tl.dot(rotation, v, input_precision="ieee", out_dtype=v.dtype))


def svd_launch(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, s and vh of `batched_svd`, and what became of each matrix, without waiting for the device.

    Args:
        x: (batch, r, r), float32 or float64, r up to 512.

    Returns:
        u (batch, r, r), s (batch, r), vh (batch, r, r), and status (batch,) int32: CONVERGED, NOT_FINITE, where s is
        NaN, or NOT_CONVERGED, also where a singular value exceeds the range of the dtype.
    """
    count, r = x.shape[:2]
    if x.numel() == 0:
        return torch.empty_like(x), x.new_empty(count, r), torch.empty_like(x), x.new_zeros(count, dtype=torch.int32)
    if cuda.chosen(x):
        return cuda.svd_launch(x)
    largest = x.abs().amax((1, 2))
    finite = largest.isfinite()
    # By a power of two: nothing is rounded, and squares neither overflow nor underflow. In two factors, since one
    # may be out of range.
    up = torch.ldexp(torch.ones_like(largest), -torch.frexp(torch.where(finite, largest, 0)).exponent // 2)
    x = (torch.where(finite[:, None, None], x, 0) * up[:, None, None] * up[:, None, None]).contiguous()
    order = torch.linalg.vector_norm(x, dim=1).argsort(dim=1, descending=True, stable=True)
    g, v, busy = (_whole if program_rank(r) in _WHOLE[x.dtype] else _by_blocks)(x, order, finite)
    # Rounding of the rotations made G V's and V's columns longer alike.
    length, drift = torch.linalg.vector_norm(g, dim=2), torch.linalg.vector_norm(v, dim=2)  # (batch, R)
    s = torch.where(length > _limits(x.dtype, program_rank(r))["ZERO"], length / drift, 0)
    padding = (g[:, :, r:] != 0).any(2)
    rows = torch.where(padding, -1, s).argsort(dim=1, descending=True, stable=True)[:, :r]  # (batch, r)
    s = s.gather(1, rows) / up[:, None] / up[:, None]
    converged = (busy == 0) & s[:, 0].isfinite()
    status = torch.where(finite, torch.where(converged, CONVERGED, NOT_CONVERGED), NOT_FINITE)
    u, vh = (
        (y[:, :, :r] / lengths[:, :, None]).gather(1, rows[:, :, None].expand(-1, -1, r))
        for y, lengths in ((v, drift), (g, length))
    )
    return u.mT, torch.where(finite[:, None], s, torch.nan), vh, status.to(torch.int32)


def program_rank(r: int) -> int:
    """The rank that a kernel computes with."""
    return max(16, triton.next_power_of_2(r))


def _limits(dtype: torch.dtype, rank: int) -> dict[str, float]:
    """Constants of the kernels; lengths are relative to the largest element."""
    noise = 2.0**-40 if dtype == torch.float32 else 2.0**-80
    return {
        "TOLERANCE": torch.finfo(dtype).eps * math.sqrt(rank),
        "NOISE": noise / math.sqrt(rank),
        # What is no longer is reported as 0: far below rounding, and far above the noise.
        "ZERO": noise * 64,
    }


# Padded ranks that one program holds, and the warps of its two kernels; above, columns of a block, and warps. With
# these none spills on any architecture of ARCHITECTURES; one exception is in `_whole_variants`.
_WHOLE = {
    torch.float32: {16: (1, 1), 32: (4, 1), 64: (4, 4)},
    torch.float64: {16: (2, 1), 32: (4, 4), 64: (8, 16)},
}
_BLOCKS = {
    torch.float32: {128: (16, 4), 256: (8, 8), 512: (8, 8)},
    torch.float64: {128: (8, 4), 256: (8, 8), 512: (8, 8)},
}


def _variant(kernel: Any, dtype: torch.dtype, rank: int, warps: int, **constants: int) -> Variant:
    values = {"R": rank, "SWEEPS": MAX_SWEEPS, **_limits(dtype, rank), **constants}
    return Variant(kernel, {name: values[name] for name in kernel.arg_names if name in values}, warps)


def _whole_variants(arch: str, dtype: torch.dtype, rank: int) -> tuple[Variant, Variant]:
    triangular, whole = _WHOLE[dtype][rank]
    if (arch, dtype, rank) == ("sm_120", torch.float32, 64):
        whole = 8
    return _variant(triangular_kernel, dtype, rank, triangular), _variant(whole_kernel, dtype, rank, whole)


def _block_variant(dtype: torch.dtype, rank: int) -> Variant:
    width, warps = _BLOCKS[dtype][rank]
    return _variant(pair_kernel, dtype, rank, warps, C=width, CHUNK=min(32, rank))


def _whole(x: Tensor, order: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G V and V (batch, R, R), columns as rows, and whether a matrix has not converged (batch,)."""
    count, r = x.shape[:2]
    rank = program_rank(r)
    g, v, busy = x.new_empty(count, rank, rank), x.new_empty(count, rank, rank), finite.to(torch.int32)
    triangular, rotations = _whole_variants(architecture(x.device), x.dtype, rank)
    triangular.launch((count,), x, order, g, v, r)
    rotations.launch((count,), g, v, busy, r)
    return g, v, busy


def _by_blocks(x: Tensor, order: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_whole`, for any rank; the QR is torch's."""
    count, r = x.shape[:2]
    rank = program_rank(r)
    columns = order[:, None, :].expand_as(x)
    q, triangle = torch.linalg.qr(x.gather(2, columns))
    v = torch.eye(rank, dtype=x.dtype, device=x.device).repeat(count, 1, 1)
    g = v * _limits(x.dtype, rank)["NOISE"]  # the padding, as in triangular_kernel
    g[:, :r, :r] = torch.empty_like(x).scatter_(2, columns, triangle)
    v[:, :r, :r] = q.mT
    busy = torch.zeros(MAX_SWEEPS + 1, count, dtype=torch.int32, device=x.device)
    busy[0] = finite
    variant = _block_variant(x.dtype, rank)
    blocks = rank // variant.constants["C"]
    for sweep in range(MAX_SWEEPS):
        for step in range(1, blocks):
            variant.launch((count, blocks // 2), g, v, busy, r, sweep, step)
    return g, v, busy[MAX_SWEEPS]


def shipped(arch: str) -> Iterator[Shipped]:
    """Every variant that `svd_launch` may choose on an architecture."""
    for dtype, name in ((torch.float32, "*fp32"), (torch.float64, "*fp64")):
        if dtype == torch.float64 and not ARCHITECTURES[arch].float64:
            continue
        for rank in (16, 32, 64, 128, 256, 512):
            label = f"batched_svd {name[1:]} r={rank}"
            if rank in _WHOLE[dtype]:
                triangular, rotations = _whole_variants(arch, dtype, rank)
                signature = {"p_x": name, "p_order": "*i64", "p_g": name, "p_w": name, "r": "i32"}
                yield Shipped(f"{label} triangular", triangular, signature)
                yield Shipped(f"{label} whole", rotations, {"p_g": name, "p_v": name, "p_busy": "*i32", "r": "i32"})
            else:
                signature = {"p_g": name, "p_v": name, "p_busy": "*i32", "r": "i32", "sweep": "i32", "step": "i32"}
                yield Shipped(f"{label} pair", _block_variant(dtype, rank), signature)


def batched_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the public function of that name; waits for the device to learn what became of the matrices."""
    u, s, vh, status = svd_launch(x)
    failed = status.nonzero()
    if len(failed):
        i = int(failed[0])
        if int(status[i]) == NOT_FINITE:
            raise ValueError(f"matrix {i} of x holds a NaN or an infinity")
        raise RuntimeError(f"the SVD of matrix {i} of x did not converge, or a singular value overflows {x.dtype}")
    return u, s, vh

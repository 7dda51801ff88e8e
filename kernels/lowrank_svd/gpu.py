"""The Gram route on a GPU: Gram matrices of all factors in two launches by Triton, what follows batched, in float64.

A program sums the products of a tile of a factor's columns over a piece of its rows, and leaves them as a partial Gram
matrix; a second kernel adds the pieces in order. Products are exact and sums are in float64, or, where the card's
float64 is slow, in three float32 numbers each. All r × r steps after that are the batched routines of cuSOLVER and
cuBLAS by way of torch, on (modules, 2, R, R) at once, and ``batched_svd``'s kernels. The host asks for nothing but
the losses, at the end; where float64 is slow, torch's SVD of the cores may ask for more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_fast.kernels.batched_svd.gpu import CONVERGED, svd_launch
from spectral_fast.kernels.gpu import ARCHITECTURES, Shipped, Variant, architecture
from spectral_fast.kernels.lowrank_svd.gram import Solved
from spectral_fast.kernels.native import CODES
from spectral_fast.kernels.pointers import aligned, current, load, table

PIECE = 2048  # rows that one program sums
CHUNK = 64  # rows that are summed before they are added to the sum of a piece
BLOCK = 1024  # elements of `reduce_kernel`
ROUNDOFF = torch.finfo(torch.float64).eps / 2
# Squares of columns shorter than the root of this lose digits to float32's underflow.
LEAST_SQUARE = 2.0**-80


_PIECE, _CHUNK, _BLOCK = tl.constexpr(PIECE), tl.constexpr(CHUNK), tl.constexpr(BLOCK)


@triton.jit
def offsets(i, o_l, length, r, FLAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where rows o_l of columns i lie, and a mask: (i, o_l) of a flat factor, (o_l, i) of a tall one."""
    if FLAT:
        o, mask = i[:, None].to(tl.int64) * length + o_l[None, :], (i < r)[:, None] & (o_l < length)[None, :]
    else:
        o, mask = o_l[:, None] * r + i[None, :], (o_l < length)[:, None] & (i < r)[None, :]
    return o, mask


@triton.jit
def gram_kernel(  # type: ignore[no-untyped-def]
    p_factors, p_partials, R, FLAT: tl.constexpr, T: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Tiles (T, T), on and above the diagonal, of partial Gram matrices (R, R); ONE if T is R."""
    p = p_factors + 5 * tl.program_id(2).to(tl.int64)
    address, length, r, code = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    first = tl.program_id(0).to(tl.int64) * _PIECE
    o_i, o_j = tl.program_id(1) // (R // T) * T, tl.program_id(1) % (R // T) * T
    if (first >= length) | (o_i > o_j):
        return
    i, j = o_i + tl.arange(0, T), o_j + tl.arange(0, T)  # (T,)
    last = tl.minimum(first + _PIECE, length)
    # What the launcher has seen to: said of what is loaded here, as no hint reaches a function's argument.
    if FLAT:
        length = tl.multiple_of(length, 8)
    else:
        r = tl.multiple_of(r, 8)
    total = tl.zeros((T, T), tl.float64)
    for chunk in range(first, last, _CHUNK):
        b_sum = tl.zeros((T, T), tl.float64)
        for at in range(chunk, tl.minimum(chunk + _CHUNK, last), ROWS):
            o_l = at + tl.arange(0, ROWS)  # (ROWS,) int64
            o, mask = offsets(i, o_l, length, r, FLAT)
            x = load(address, o, mask, code, tl.float64)  # (T, ROWS) if FLAT, else (ROWS, T)
            if ONE:
                y = x
            else:
                o, mask = offsets(j, o_l, length, r, FLAT)
                y = load(address, o, mask, code, tl.float64)
            b_sum = tl.dot(x, tl.trans(y), b_sum) if FLAT else tl.dot(tl.trans(x), y, b_sum)
        # A sum over a piece in one go would be too long, should its rounding go one way.
        total += b_sum
    p_tile = p_partials + (tl.load(p + 4) + tl.program_id(0)) * R * R
    tl.store(p_tile + i[:, None] * R + j[None, :], total)


@triton.jit
def two_sum(x, y):  # type: ignore[no-untyped-def]
    """The sum, and what its rounding lost: exact if nothing is fused."""
    z = x + y
    v = z - x
    return z, (x - (z - v)) + (y - v)


@triton.jit
def narrow_gram_kernel(p_factors, p_partials, R, FLAT: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same where float64 is slow: a chunk is summed in three float32 numbers, about as exactly as in float64."""
    p = p_factors + 5 * tl.program_id(2).to(tl.int64)
    address, length, r, code = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    first = tl.program_id(0).to(tl.int64) * _PIECE
    o_i, o_j = tl.program_id(1) // (R // T) * T, tl.program_id(1) % (R // T) * T
    if (first >= length) | (o_i > o_j):
        return
    i, j = o_i + tl.arange(0, T), o_j + tl.arange(0, T)  # (T,)
    last = tl.minimum(first + _PIECE, length)
    stride, step = (length, 1) if FLAT else (1, r)  # of i and of o_l
    total = tl.zeros((T, T), tl.float64)
    for chunk in range(first, last, _CHUNK):
        high, middle, low = tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32)
        for o_l in range(chunk, tl.minimum(chunk + _CHUNK, last)):
            x = load(address, i * stride + o_l * step, i < r, code, tl.float32)[:, None]  # (T, 1)
            y = load(address, j * stride + o_l * step, j < r, code, tl.float32)[None, :]  # (1, T)
            product = x * y
            high, lost = two_sum(high, product)
            middle, lost = two_sum(middle, lost)
            low += lost
            if code == 2:  # of 16-bit values the product is exact
                middle, lost = two_sum(middle, tl.fma(tl.broadcast_to(x, (T, T)), tl.broadcast_to(y, (T, T)), -product))
                low += lost
        total += high.to(tl.float64) + (middle.to(tl.float64) + low.to(tl.float64))
    p_tile = p_partials + (tl.load(p + 4) + tl.program_id(0)) * R * R
    tl.store(p_tile + i[:, None] * R + j[None, :], total)


@triton.jit
def reduce_kernel(p_factors, p_partials, p_grams, R):  # type: ignore[no-untyped-def]
    """Gram matrices (factors, R, R): the pieces of each, in order; what is below the diagonal is that above."""
    i_factor = tl.program_id(1).to(tl.int64)
    p = p_factors + 5 * i_factor
    pieces = tl.cdiv(tl.load(p + 1), _PIECE)
    e = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)  # (BLOCK,)
    i, j = e // R, e % R
    mask = i < R
    p_partial = p_partials + tl.load(p + 4) * R * R + tl.minimum(i, j) * R + tl.maximum(i, j)
    total = tl.zeros((_BLOCK,), tl.float64)
    for piece in range(pieces):
        total += tl.load(p_partial + piece * R * R, mask=mask, other=0.0)
    tl.store(p_grams + i_factor * R * R + e, total, mask=mask)


def gram_variant(arch: str, flat: bool, width: int) -> Variant:
    """What forms the Gram matrices of factors of this padded rank."""
    if not ARCHITECTURES[arch].float64:
        return Variant(narrow_gram_kernel, {"FLAT": flat, "T": min(width, 32)}, fusion=False)
    # Operands of float64 products take many registers: rows are few where a tile is large.
    rows = 32 if width < 64 else 16 if width == 64 else 8
    shape = {"FLAT": flat, "T": min(width, 64), "ONE": width <= 64, "ROWS": rows}
    return Variant(gram_kernel, shape, warps=8 if width >= 64 else 4)


REDUCE = Variant(reduce_kernel)


def filled_rank(r: int) -> int:
    """The rank up to which a module's r × r matrices are filled: 16, 32, 64, and multiples of 64 above."""
    return next((width for width in (16, 32) if r <= width), -(-r // 64) * 64)


class _Group(NamedTuple):
    """Modules of one padded rank on one device: what is computed of them so far, on that device."""

    chosen: list[int]
    s: Tensor
    t: Tensor
    quality: Tensor


def solve(bs: Sequence[Tensor], as_: Sequence[Tensor]) -> Solved:
    """See `Solved`; one group of modules after the other is launched, and only then is anything read."""
    members = defaultdict(list)
    for i, b in enumerate(bs):
        members[b.device, filled_rank(b.shape[1])].append(i)
    groups = []
    for (device, width), chosen in members.items():
        with current(device):
            gram = grams([bs[i] for i in chosen], [as_[i] for i in chosen], width)
            ranks = table([[bs[i].shape[1]] for i in chosen], device)
            lengths = table([(bs[i].shape[0], as_[i].shape[1]) for i in chosen], device)
            narrow = not ARCHITECTURES[architecture(device)].float64
            groups.append(_Group(chosen, *_factor(gram, ranks, lengths, narrow)))
    found = {}
    for group in groups:
        for i, s, t, losses in zip(group.chosen, group.s, group.t, group.quality.tolist(), strict=True):
            r = bs[i].shape[1]
            found[i] = (s[:r], t[0, :r, :r], t[1, :r, :r]), losses
    return Solved([found[i][0] for i in range(len(bs))], [found[i][1] for i in range(len(bs))])


def grams(bs: Sequence[Tensor], as_: Sequence[Tensor], width: int) -> Tensor:
    """BᵀB and A Aᵀ of every module, (modules, 2, width, width) float64, zero beyond r; all factors on one device."""
    device = bs[0].device
    result = torch.empty(len(bs), 2, width, width, dtype=torch.float64, device=device)
    for side, factors in enumerate((bs, as_)):
        flat = side == 1
        readable = [aligned(x) for x in factors]
        rows, pieces = [], 0
        for x, original in zip(readable, factors, strict=True):
            # Zeros that alignment added to a row change nothing; a tall factor's have their own columns.
            length, r = (x.shape[1], original.shape[0]) if flat else x.shape
            rows.append((x.data_ptr(), length, r, CODES[x.dtype], pieces))
            pieces += triton.cdiv(length, PIECE)
        partials = result.new_empty(pieces, width, width)
        modules, sums = table(rows, device), result.new_empty(len(bs), width, width)
        variant = gram_variant(architecture(device), flat, width)
        tiles = width // variant.constants["T"]
        most = max(triton.cdiv(row[1], PIECE) for row in rows)
        variant.launch((most, tiles * tiles, len(rows)), modules, partials, width)
        REDUCE.launch((triton.cdiv(width * width, BLOCK), len(rows)), modules, partials, sums, width)
        result[:, side] = sums
    return result


def _factor(gram: Tensor, ranks: Tensor, lengths: Tensor, narrow: bool) -> tuple[Tensor, Tensor, Tensor]:
    """From Gram matrices (modules, 2, R, R): s (modules, R), T_B and T_A (modules, 2, R, R), quality (modules, 2)."""
    eye = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    inside = torch.arange(gram.shape[-1], device=gram.device) < ranks  # (modules, R)
    squares = gram.diagonal(dim1=-2, dim2=-1)  # (modules, 2, R)
    lower, info = torch.linalg.cholesky_ex(gram + eye * ~inside[:, None, None])
    sound = (info == 0).all(1) & lower.isfinite().flatten(1).all(1)
    if narrow:
        sound &= ((squares > LEAST_SQUARE) | ~inside[:, None]).flatten(1).all(1)
    lower = torch.where(sound[:, None, None, None], lower, eye)
    core = (lower[:, 0].mT @ lower[:, 1]) * inside[:, :, None] * inside[:, None]
    if narrow:  # the Jacobi kernels are not shipped in float64 there
        w, s, zh = torch.linalg.svd(core)
    else:
        w, s, zh, status = svd_launch(core)
        sound &= status == CONVERGED
    t = torch.linalg.solve_triangular(lower.mT, torch.stack([w, zh.mT], 1), upper=True)
    t = t * inside[:, None, :, None] * inside[:, None, None]
    # What the steps lost shows in Tᵀ G T − I. What the Gram matrices had lost before does not show: G errs by about
    # (√length + r) roundoffs of d_i d_j, d² its diagonal, and T carries that into UᵀU.
    off = torch.linalg.matrix_norm(t.mT @ gram @ t - eye * inside[:, None, None])  # (modules, 2)
    columns = (squares[..., None] * t.square()).sum(-2)  # (modules, 2, R): of |factor| |T|, squared
    loss = off + (lengths.sqrt() + ranks) * ROUNDOFF * columns.sum(-1)
    loss = torch.where(sound[:, None] & loss.isfinite(), loss, torch.inf)
    return s, t, torch.stack([loss.amax(1), columns.flatten(1).amax(1).sqrt()], 1)


def shipped(arch: str) -> Iterator[Shipped]:
    """All that `solve` may launch, but for what the SVD of the cores does."""
    signature = {"p_factors": "*i64", "p_partials": "*fp64", "R": "i32:16"}
    fast = ARCHITECTURES[arch].float64
    widths = (16, 32, 64, 128) if fast else (16, 32)
    for flat in (False, True):
        for width in widths:
            title = f"gram, {'flat' if flat else 'tall'}, rank {width}"
            more = " and more" if width == widths[-1] else ""
            yield Shipped(title + more, gram_variant(arch, flat, width), signature, matrix=fast)
    yield Shipped("reduce", REDUCE, {**signature, "p_grams": "*fp64", "R": "i32:16"})

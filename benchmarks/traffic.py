"""Bytes that each Triton kernel loads and stores, from what it is launched with: grids, sizes and tables.

A model per kernel, exact: ``tests/test_roofline.py`` compares every one with what the interpreter really loads and
stores. The launches are those of the launchers themselves, recorded, so that no choice of theirs is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_fast.backends import register, registered
from spectral_fast.kernels.gpu import Shipped, Variant

WORD = 8  # bytes of an entry of a table


@dataclass(frozen=True)
class Traffic:
    """Bytes between a multiprocessor and memory or its cache.

    Attributes:
        read: loaded, each element once.
        again: loaded once more, by other programs: of operands that are small enough to have stayed in the L2 cache.
        written: stored.
        indices: loaded from tables of addresses, sizes and blocks.
    """

    read: int = 0
    again: int = 0
    written: int = 0
    indices: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read + other.read,
            self.again + other.again,
            self.written + other.written,
            self.indices + other.indices,
        )

    def times(self, programs: int) -> Traffic:
        """The same of so many programs."""
        return Traffic(*(programs * x for x in (self.read, self.again, self.written, self.indices)))

    @property
    def loaded(self) -> int:
        """All that is loaded."""
        return self.read + self.again + self.indices

    @property
    def memory(self) -> int:
        """What the memory itself must move."""
        return self.read + self.written + self.indices


@dataclass(frozen=True)
class Launch:
    """A variant of a kernel, its grid and its arguments by name, constants included."""

    variant: Variant
    grid: tuple[int, ...]
    args: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def kernel(self) -> str:
        """Its name."""
        return str(self.variant.kernel.__name__)

    @property
    def programs(self) -> int:
        """How many there are."""
        return int(np.prod(self.grid))

    def traffic(self) -> Traffic:
        """By the kernel's model."""
        return MODELS[self.kernel](self)

    def fits(self, shipped: Shipped, *, any_sizes: bool = False) -> bool:
        """Whether it is what a shipped variant was compiled for: the variant, and the type of every argument.

        With `any_sizes` the variant stands for sizes of which some are multiples of 16, and some are not.
        """
        kernel = self.variant.kernel  # as Triton's compiler has it, or its interpreter
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        general = options.get("do_not_specialize") or ()
        return self.variant == shipped.variant and all(
            _is_of(self[name], kind, general=any_sizes or name in general) for name, kind in shipped.signature.items()
        )

    def flops(self) -> int:
        """Of its matrix products, with the padding of their tiles."""
        return 2 * FLOPS[self.kernel](self) if self.kernel in FLOPS else 0


TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "i32": torch.int32,
    "i64": torch.int64,
}


def _is_of(x: Any, kind: str, *, general: bool) -> bool:
    """Whether an argument is of a kind; a number that is not `general` is compiled as a multiple of 16, or as none."""
    if kind.startswith("*"):
        return isinstance(x, Tensor) and x.dtype == TYPES[kind[1:]] and x.data_ptr() % 16 == 0
    if kind == "fp32":
        return isinstance(x, float)
    # As Triton sees a number: 64 bits only where it needs them.
    if not isinstance(x, int) or abs(x) >= 2**31 or not kind.startswith("i32"):
        return False
    return kind == "i32" if general else x != 1 and kind == ("i32" if x % 16 else "i32:16")


@contextmanager
def recorded(around: Callable[[Launch, Callable[[], None]], None] | None = None) -> Iterator[list[Launch]]:
    """The launches within the context, on any machine: every op that has a backend "gpu" takes it.

    Args:
        around: called with a launch and what runs it. Without it nothing is run, so tensors keep what they hold.
    """
    launches: list[Launch] = []
    run, backends = Variant.launch, registered()

    def launch(variant: Variant, grid: tuple[int, ...], *args: Any) -> None:
        if not all(grid):
            return
        names = [name for name in variant.kernel.arg_names if name not in variant.constants]
        named = dict(zip(names, args, strict=True)) | dict(variant.constants)
        launches.append(Launch(variant, grid, named))
        if around is not None:
            around(launches[-1], lambda: run(variant, grid, *args))

    Variant.launch = launch  # type: ignore[method-assign]
    for op, choices in backends.items():
        if chosen := [replace(x, refuses=lambda *_: None) for x in choices if x.name == "gpu"]:
            register(op, *chosen)
    try:
        yield launches
    finally:
        Variant.launch = run  # type: ignore[method-assign]
        for op, choices in backends.items():
            register(op, *choices)


def _project(x: Launch) -> Traffic:
    e, tokens, length, r = x["p_x"].element_size(), x["tokens"], x["length"], x["r"]
    factor = length * r * e
    return Traffic(tokens * length * e + factor, (x.grid[0] - 1) * factor, x.grid[1] * tokens * r * 4)


def _expand(x: Launch) -> Traffic:
    e, tokens, length, r = x["p_out"].element_size(), x["tokens"], x["length"], x["r"]
    blocks, shares = x.grid
    parts, factor, matrix, p = x["parts"] * tokens * r * 4, length * r * e, tokens * length * e, tokens * r * e
    segments = len(set(x["p_blocks"][:, 2].tolist()))
    read = parts + factor + segments * r * 4 + (p if x["BACKWARD"] else matrix)
    again = (shares - 1) * parts + (blocks - 1) * factor + (blocks * shares - segments) * r * 4
    written = matrix + (blocks * r * 4 if x["BACKWARD"] else p)
    return Traffic(read, again, written, 3 * WORD * x.programs)


def _products(x: Launch) -> Traffic:
    blocks, (tokens, r) = x.grid[0], x["p_p"].shape
    return Traffic(2 * tokens * r * x["p_p"].element_size(), 0, blocks * r * 4, 2 * WORD * x.programs)


def _sum(x: Launch) -> Traffic:
    segments, _, groups = x.grid
    return Traffic(groups * x["blocks"] * x["r"] * 4, 0, groups * segments * x["r"] * 4, 2 * WORD * x.programs)


def _grouped(x: Launch) -> Traffic:
    blocks, modules = x.grid
    tokens = int((x["p_blocks"][:, 1] - x["p_blocks"][:, 0]).sum())
    e = 4 if str(x["TYPE"]) == "fp32" else 2
    f = 4 if x["BASIS"] else e
    read = again = 0
    for n, m, r in x["p_modules"][:, 6:9].tolist():
        read += tokens * (n + m) * e + (n + m) * r * f
        again += (blocks - 1) * (n + m) * r * f
    return Traffic(read, again, modules * blocks * x["R"] * 4, (9 + 2) * WORD * x.programs)


def _transform(x: Launch) -> Traffic:
    width, block = x["W"], 1024
    read = again = 0
    e = np.arange(x.grid[0] * block).reshape(-1, block)
    for k, r in x["p_transforms"][:, 5:7].tolist():
        scales = sum(len(np.unique((row % width)[(row // width < k) & (row % width < r)])) for row in e)
        read += (k * r + r) * 8
        again += (scales - r) * 8
    size = 3 * 2 if x["SPLIT"] else 8
    return Traffic(read, again, x.grid[1] * width * width * size, 7 * WORD * x.programs)


def _resident(x: Launch) -> Traffic:
    step, transform = x["ROWS"] * x["TILES"], 3 * x["W"] ** 2 * 2
    total = Traffic(indices=WORD * x.programs)
    for length, k, r in x["p_products"][:, 2:5].tolist():
        active = -(-length // step)
        total += Traffic(length * k * 2 + transform, (active - 1) * transform, length * r * 2, 4 * WORD * active)
    return total


ITEMSIZE = {0: 2, 1: 2, 2: 4, 3: 8}  # of ``native.CODES``


def _streaming(x: Launch) -> Traffic:
    wide = str(x["TYPE"]) == "fp64"
    total = Traffic(indices=WORD * x.programs)
    for length, k, r, code, code_out in x["p_products"][:, 2:7].tolist():
        active = -(-length // x["ROWS"])
        transform = -(-k // x["INNER"]) * x["INNER"] * x["W"] * (8 if wide else 3 * 2)
        total += Traffic(
            length * k * ITEMSIZE[code] + transform,
            (active - 1) * transform,
            length * r * ITEMSIZE[code_out],
            (6 if wide else 5) * WORD * active,
        )
    return total


def _gram(x: Launch) -> Traffic:
    size, piece = x["T"], 2048
    tiles = x["R"] // size
    total = Traffic(indices=4 * WORD * x.programs)
    for length, r, code in x["p_factors"][:, 1:4].tolist():
        columns = [min(size, max(0, r - i * size)) for i in range(tiles)]
        pairs = [(i, j) for i in range(tiles) for j in range(i, tiles)]
        loads = sum(columns[i] if x["ONE"] else columns[i] + columns[j] for i, j in pairs)
        active = -(-length // piece) * len(pairs)
        e = ITEMSIZE[code]
        total += Traffic(length * r * e, length * (loads - r) * e, active * size**2 * 8, WORD * active)
    return total


def _reduce(x: Launch) -> Traffic:
    width, block = x["R"], 1024
    e = np.arange(x.grid[0] * block).reshape(-1, block)
    i, j = e // width, e % width
    upper = np.minimum(i, j) * width + np.maximum(i, j)
    loads = sum(len(np.unique(row[mask])) for row, mask in zip(upper, i < width, strict=True)) * 8
    once = width * (width + 1) // 2 * 8
    pieces = sum(-(-length // 2048) for length in x["p_factors"][:, 1].tolist())
    written = x.grid[1] * width * width * 8
    return Traffic(pieces * once, pieces * (loads - once), written, 2 * WORD * x.programs)


def _triangular(x: Launch) -> Traffic:
    r, width, e = x["r"], x["R"], x["p_x"].element_size()
    return Traffic(r * r * e, 0, ((r - 1) * width + width**2) * e, (r - 1) * WORD).times(x.programs)


def _whole(x: Launch) -> Traffic:
    r, width, e = x["r"], x["R"], x["p_g"].element_size()
    return Traffic(((r - 1) * width + width**2) * e + 4, 0, 2 * width**2 * e + 4).times(x.programs)


def _spline_tables(x: Launch) -> Traffic:
    """Values and scales; a piecewise program loads both ends of every piece, and is taken to have all of them."""
    own, knots = 2, x["knots"]
    loads = (knots if x["SOFT"] else 2 * (knots - 1)) + own
    return Traffic((knots + own) * 4, (x.programs * loads - knots - own) * 4)


def _spline_forward(x: Launch) -> Traffic:
    read = x["p_x"].nbytes + (x["p_base"].nbytes if x["BASE"] else 0)
    return _spline_tables(x) + Traffic(read, 0, x["p_y"].nbytes)


def _spline_backward(x: Launch) -> Traffic:
    return _spline_tables(x) + Traffic(x["p_x"].nbytes + x["p_dy"].nbytes, 0, x["p_dx"].nbytes + x["p_sums"].nbytes)


def _top(x: Launch) -> Traffic:
    e, rows = x["p_logits"].element_size(), x["vocabulary"] * x["p_logits"].element_size()
    live = int((x["p_labels"] != -100).sum())
    gold = int((x["p_labels"] >= 0).sum()) * e
    # Once for the logsumexp, once for each byte of the least that is kept, once to keep.
    again = live * rows * (x["BYTES"] + 1) + gold
    return Traffic(live * rows, again, live * (2 * 4 + x["top"] * 12), WORD * x.programs)


def _count(x: Launch) -> Traffic:
    tokens, features, m = x.grid[0], x["features"], x["m"]
    tables = features * (4 + WORD) + 2 * m * WORD
    hidden = tokens * features * x["p_hidden"].element_size()
    return Traffic(hidden + tables, (tokens - 1) * tables, tokens * m * 4)


def _convolve(x: Launch) -> Traffic:
    runs, parts = x.grid
    errors = x["p_errors"] != 0
    live, terms = int(errors.any(1).sum()), int(errors.sum())
    of_terms = errors.numel() * (4 + 4)
    row = x["m"] * 4
    return Traffic(of_terms + live * row, (parts - 1) * of_terms + (terms - live) * row, runs * row)


MODELS: dict[str, Callable[[Launch], Traffic]] = {
    "top_kernel": _top,
    "count_kernel": _count,
    "convolve_kernel": _convolve,
    "project_kernel": _project,
    "expand_kernel": _expand,
    "products_kernel": _products,
    "sum_kernel": _sum,
    "grouped_kernel": _grouped,
    "transform_kernel": _transform,
    "resident_kernel": _resident,
    "streaming_kernel": _streaming,
    "gram_kernel": _gram,
    "reduce_kernel": _reduce,
    "triangular_kernel": _triangular,
    "whole_kernel": _whole,
    "spline_kernel": _spline_forward,
    "spline_backward_kernel": _spline_backward,
}


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


def _grouped_flops(x: Launch) -> int:
    lengths = (_up(n, x["LENGTH"]) + _up(m, x["LENGTH"]) for n, m in x["p_modules"][:, 6:8].tolist())
    return x.grid[0] * x["TOKENS"] * x["R"] * sum(lengths)


def _recompose_flops(x: Launch) -> int:
    """A transform in three parts, a float16 in two: all products but one that is below rounding."""
    products = {"bf16": 3, "fp16": 5, "fp64": 1}[str(x["TYPE"])]
    inner = x.args.get("INNER", x["W"])
    ks = x["p_products"][:, 2:4].tolist()
    return products * x["W"] * sum(_up(length, x["ROWS"]) * _up(max(k, 1), inner) for length, k in ks)


def _gram_flops(x: Launch) -> int:
    tiles = x["R"] // x["T"]
    lengths = sum(_up(length, x["ROWS"]) for length in x["p_factors"][:, 1].tolist())
    return lengths * x["T"] ** 2 * tiles * (tiles + 1) // 2


# Multiplications in tl.dot.
FLOPS: dict[str, Callable[[Launch], int]] = {
    "project_kernel": lambda x: x.grid[0] * x["TOKENS"] * x["R"] * _up(x["length"], x["LENGTH"]),
    "expand_kernel": lambda x: x.grid[0] * x["TOKENS"] * x["R"] * _up(x["length"], x["LENGTH"]),
    "grouped_kernel": _grouped_flops,
    "resident_kernel": _recompose_flops,
    "streaming_kernel": _recompose_flops,
    "gram_kernel": _gram_flops,
}

"""What each kernel cannot avoid: bytes that must be read and written once, flops that must be done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, int]  # out features m, in features n


class Work(NamedTuple):
    """Bytes, and flops by what they run on: a unit of ``cards.Card``."""

    nbytes: int
    flops: dict[str, int]


def forward(shape: Shape, tokens: int, r: int, itemsize: int) -> Work:
    """``spectral_linear``: x, y, U and V are read, out is written, and p for the backward pass."""
    m, n = shape
    return Work((tokens * (n + 2 * m + r) + (m + n) * r) * itemsize, {"bfloat16": 2 * tokens * (m + n) * r})


def backward(shape: Shape, tokens: int, r: int, itemsize: int) -> Work:
    """Its gradients by x and s: dy, p, U and V are read, dx is written."""
    m, n = shape
    return Work((tokens * (n + m + r) + (m + n) * r) * itemsize, {"bfloat16": 2 * tokens * (m + n) * r})


def products(tokens: int, samples: int, r: int, itemsize: int) -> Work:
    """``segment_products``: p and q are read, a float32 row per sample is written."""
    return Work(2 * tokens * r * itemsize + 4 * samples * r, {"float32": 2 * tokens * r})


def grouped(shapes: Sequence[Shape], tokens: int, samples: int, r: int, itemsize: int) -> Work:
    """``grouped_products``: x, dy, U and V of each module are read, a float32 row per sample is written."""
    length = sum(m + n for m, n in shapes)
    written = 4 * len(shapes) * samples * r
    return Work((tokens + r) * length * itemsize + written, {"bfloat16": 2 * tokens * length * r})


def spectra(shapes: Sequence[Shape], r: int, itemsize: int) -> Work:
    """``lowrank_svd``: the factors are read; half of each Gram matrix, in float64, which squared conditions need.

    What is done to r × r matrices is left out.
    """
    length = sum(m + n for m, n in shapes)
    return Work(length * r * itemsize, {"float64": length * r**2})


def recomposed(shapes: Sequence[Shape], r: int, itemsize: int) -> Work:
    """``recompose``: the factors are read and written."""
    length = sum(m + n for m, n in shapes)
    return Work(2 * length * r * itemsize, {"bfloat16": 2 * length * r**2})


def spline(elements: int, itemsize: int, base: bool) -> Work:
    """``spline``: x, and the base if there is one, are read, y is written."""
    return Work((3 if base else 2) * elements * itemsize, {"float32": 8 * elements})


def spline_backward(elements: int, itemsize: int) -> Work:
    """Its gradients: dy and x are read, dx is written."""
    return Work(3 * elements * itemsize, {"float32": 12 * elements})


def svds(count: int, r: int, itemsize: int) -> Work:
    """``batched_svd``: Golub and Van Loan's count for a square matrix (Matrix Computations, on the SVD)."""
    return Work(count * (3 * r * r + r) * itemsize, {"float32": 21 * count * r**3})

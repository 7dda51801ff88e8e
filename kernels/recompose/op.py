"""The public function: checks the products once and hands them to the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_fast.backends import Backend, pick, register
from spectral_fast.kernels import native


class Product(NamedTuple):
    """One product to form: out ← basis @ transform, or transform @ basis for a flat basis.

    Attributes:
        basis: tall (length, k), or flat (k, length): bfloat16, float16, float32 or float64.
        transform: (k, r), or (r, k) for a flat basis, float64.
        out: (length, r), or (r, length): contiguous, any of these dtypes; may be `basis` itself.
        flat: which of the two.
        wide: sums in float64 rather than float32.
    """

    basis: Tensor
    transform: Tensor
    out: Tensor
    flat: bool
    wide: bool


def recompose(products: Sequence[Product]) -> list[bool]:
    """Form all products in place of their `out`, each rounded once to its dtype.

    Args:
        products: shapes, ranks and dtypes may differ. An `out` may be its own basis, all of it, and may share memory
            with nothing else.

    Returns:
        for each product, whether every value of `out` is finite.

    Raises:
        ValueError: shapes do not fit, an `out` is not contiguous, or shares memory with anything but its own basis.
        TypeError: a dtype that is not supported.
        RuntimeError: no backend takes the tensors.

    Cost: reads each basis once and writes each `out` once; 2 · length · k · r flops.
    """
    for product in products:
        _check(*product)
    _check_overlap(products)
    finite: list[bool] = pick("recompose", products).call(products)
    torch.autograd.graph.increment_version([product.out for product in products])
    return finite


def _check(basis: Tensor, transform: Tensor, out: Tensor, flat: bool, wide: bool) -> None:  # noqa: ARG001
    inner, length = basis.shape if flat else basis.shape[::-1]
    k, r = transform.shape[::-1] if flat else transform.shape
    expected = (r, length) if flat else (length, r)
    if inner != k or out.shape != expected:
        order = "transform @ basis" if flat else "basis @ transform"
        raise ValueError(
            f"out {tuple(out.shape)} = {order} does not fit basis {tuple(basis.shape)}, transform "
            f"{tuple(transform.shape)}"
        )
    if transform.dtype != torch.float64 or basis.dtype not in native.CODES or out.dtype not in native.CODES:
        raise TypeError(
            f"a basis and an out of {', '.join(map(str, native.CODES))} and a transform of torch.float64; got "
            f"{basis.dtype}, {out.dtype}, {transform.dtype}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()} for shape {tuple(out.shape)}")


def _check_overlap(products: Sequence[Product]) -> None:
    """All products are formed at once, so what one writes no other may read or write."""
    spans = []
    for i, (basis, _, out, _, _) in enumerate(products):
        in_place = basis.data_ptr() == out.data_ptr() and basis.shape == out.shape and basis.dtype == out.dtype
        for x, written in ((out, True), *(() if in_place else ((basis, False),))):
            if x.numel():
                extent = sum((n - 1) * abs(step) for n, step in zip(x.shape, x.stride(), strict=True)) + 1
                spans.append((str(x.device), x.data_ptr(), x.data_ptr() + extent * x.itemsize, written, i))
    spans.sort()
    furthest: dict[bool, tuple[str, int, int]] = {}  # of what is written, and of what is only read, so far
    for device, begin, end, written, i in spans:
        for other, (where, reached, j) in furthest.items():
            if (written or other) and where == device and begin < reached:
                raise ValueError(f"products {j} and {i} share memory that one of them writes; give each its own out")
        if written not in furthest or furthest[written][:2] < (device, end):
            furthest[written] = (device, end, i)


def _reference(products: Sequence[Product]) -> list[bool]:
    finite = []
    for basis, transform, out, flat, _ in products:
        out.copy_(transform @ basis.double() if flat else basis.double() @ transform)
        finite.append(bool(out.isfinite().all()))
    return finite


def _cpu(products: Sequence[Product]) -> list[bool]:
    from spectral_fast import _C

    kept = [(product.basis.contiguous(), product.transform.contiguous()) for product in products]
    rows = [
        (
            *(basis.data_ptr(), native.CODES[basis.dtype], flat, basis.shape[flat], basis.shape[not flat]),
            *(transform.data_ptr(), transform.shape[not flat]),
            *(out.data_ptr(), native.CODES[out.dtype], wide),
        )
        for (basis, transform), (_, _, out, flat, wide) in zip(kept, products, strict=True)
    ]
    finite = torch.empty(len(products), dtype=torch.bool)
    # At most a thread per module, which has two products: who has one module at a time runs several calls at once.
    threads = min(torch.get_num_threads(), (len(products) + 1) // 2)
    _C.recompose(native.table(rows, 10), finite.numpy(), max(threads, 1))
    return finite.tolist()


def _refuses(products: Sequence[Product] = ()) -> str | None:
    return native.refuses(x for product in products for x in product[:3])


register("recompose", Backend("cpu", _refuses, _cpu), Backend("reference", lambda *_: None, _reference))

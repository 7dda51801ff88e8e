"""The public function: checks the products once and hands them to the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_fast.backends import Backend, pick, register
from spectral_fast.kernels import gpu, native
from spectral_fast.kernels.recompose.product import Product


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
    backend = pick("recompose", products)
    if backend.name != "cpu":  # the native module looks for itself, which is faster
        _check_overlap(products)
    finite: list[bool] = backend.call(products)
    torch.autograd.graph.increment_version([product.out for product in products])
    return finite


def _check(basis: Tensor, transform: Tensor, scale: Tensor, out: Tensor, flat: bool, wide: bool) -> None:  # noqa: ARG001
    if (basis.ndim, transform.ndim, scale.ndim, out.ndim) != (2, 2, 1, 2):
        raise ValueError("basis, transform and out must be matrices, and scale a vector")
    inner, length = basis.shape if flat else basis.shape[::-1]
    k, r = transform.shape
    if inner != k or scale.shape != (r,) or out.shape != ((r, length) if flat else (length, r)):
        raise ValueError(
            f"{'a flat' if flat else 'a tall'} basis {tuple(basis.shape)}, transform {tuple(transform.shape)}, scale "
            f"{tuple(scale.shape)} and out {tuple(out.shape)} do not fit together"
        )
    if (
        not (transform.dtype == scale.dtype == torch.float64)
        or basis.dtype not in native.CODES
        or out.dtype not in native.CODES
    ):
        raise TypeError(
            f"a basis and an out of {', '.join(map(str, native.CODES))} and a transform and scale of "
            f"torch.float64; got {basis.dtype}, {out.dtype}, {transform.dtype}, {scale.dtype}"
        )
    if not (basis.device == transform.device == scale.device == out.device):
        places = ", ".join(str(x.device) for x in (basis, transform, scale, out))
        raise ValueError(f"basis, transform, scale and out must be on one device, got {places}")
    if not out.is_contiguous() or out.is_neg():
        strides = "a lazy negation" if out.is_neg() else f"strides {out.stride()}"
        raise ValueError(f"out must be contiguous, got {strides} for shape {tuple(out.shape)}")


def _check_overlap(products: Sequence[Product]) -> None:
    spans = []
    for i, (basis, _, _, out, _, _) in enumerate(products):
        in_place = (out.data_ptr(), out.shape, out.dtype) == (basis.data_ptr(), basis.shape, basis.dtype)
        for x, written in ((out, True), *([] if in_place else [(basis, False)])):
            if x.numel():
                last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True)) + 1
                spans.append((str(x.device), x.data_ptr(), x.data_ptr() + last * x.element_size(), written, i))
    furthest: dict[tuple[str, bool], tuple[int, int]] = {}  # of what is read, and of what is written
    for device, begin, end, written, i in sorted(spans):
        for other in (True, False):
            reached, j = furthest.get((device, other), (begin, i))
            if (written or other) and begin < reached:
                raise ValueError(f"products {j} and {i} share memory that one of them writes; give each its own out")
        if end > furthest.get((device, written), (0, 0))[0]:
            furthest[device, written] = end, i


def _reference(products: Sequence[Product]) -> list[bool]:
    finite = []
    for basis, transform, scale, out, flat, _ in products:
        scaled = transform * scale
        out.copy_(scaled.mT @ basis.double() if flat else basis.double() @ scaled)
        finite.append(bool(out.isfinite().all()))
    return finite


def _cpu(products: Sequence[Product]) -> list[bool]:
    from spectral_fast import _C

    kept = [tuple(native.readable(x) for x in product[:3]) for product in products]
    rows = [
        (
            *(basis.data_ptr(), native.CODES[basis.dtype], flat, basis.shape[flat], basis.shape[not flat]),
            *(transform.data_ptr(), scale.data_ptr(), len(scale)),
            *(out.data_ptr(), native.CODES[out.dtype], wide),
        )
        for (basis, transform, scale), (_, _, _, out, flat, wide) in zip(kept, products, strict=True)
    ]
    finite = torch.empty(len(products), dtype=torch.bool)
    # At most a thread per module, which has two products: who has one module at a time runs several calls at once.
    threads = min(torch.get_num_threads(), (len(products) + 1) // 2)
    _C.recompose(native.table(rows, 11), finite.numpy(), max(threads, 1))
    return finite.tolist()


def _refuses(products: Sequence[Product] = ()) -> str | None:
    return native.refuses(x for product in products for x in product[:4])


def _gpu_refuses(products: Sequence[Product] = ()) -> str | None:
    largest = max((n for product in products for n in product.transform.shape), default=0)
    if largest > gpu.RANKS[-1]:
        return f"a transform has a side of {largest}; kernels are compiled for up to {gpu.RANKS[-1]}"
    return gpu.refuses(x for product in products for x in product[:4])


def _gpu(products: Sequence[Product]) -> list[bool]:
    from spectral_fast.kernels.recompose.gpu import recompose as call  # importing triton takes its time

    return call(products)


register(
    "recompose",
    Backend("cpu", _refuses, _cpu),
    Backend("gpu", _gpu_refuses, _gpu),
    Backend("reference", lambda *_: None, _reference),
)

"""The bytes that the roofline counts are those that the kernels load and store, by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import roofline, traffic
from benchmarks.codegen import uncompiled
from spectral_fast.kernels import gpu
from spectral_fast.kernels.head_sketch import Hashes, head_sketch
from spectral_fast.kernels.recompose import Product, recompose
from spectral_fast.kernels.sensitivity import Module, grouped_products, segment_products
from spectral_fast.kernels.spectral_linear import spectral_linear
from spectral_fast.kernels.spline import spline

pytest.importorskip("triton")


pytestmark = pytest.mark.skipif(not gpu.INTERPRETED, reason="a GPU is here: these are the interpreter's tests")

STARTS = torch.tensor([0, 23, 23, 90])


class Counter:
    """Bytes of distinct elements in every load and store of the interpreter, and flops of its matrix products."""

    def __init__(self) -> None:
        self.loaded = self.stored = self.flops = 0

    @staticmethod
    def size(pointers: Any, mask: np.ndarray) -> int:
        addresses = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask).shape)
        active = np.unique(addresses[np.broadcast_to(mask, addresses.shape)])
        return len(active) * max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextmanager
def counting() -> Iterator[Counter]:
    """What the interpreter loads, stores and multiplies within the context."""
    from triton.runtime.interpreter import interpreter_builder as builder

    count, dot = Counter(), builder.create_dot
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(ptrs: Any, mask: Any, *args: Any) -> Any:
        count.loaded += count.size(ptrs, mask.data)
        return load(ptrs, mask, *args)

    def counted_store(ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        count.stored += count.size(ptrs, mask.data)
        return store(ptrs, value, mask, *args)

    def counted_dot(a: Any, b: Any, *args: Any) -> Any:
        count.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(builder, "create_dot", counted_dot)
        yield count


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def branch() -> None:
    x, y = randn(90, 600).requires_grad_(), randn(90, 72)
    s = torch.ones(3, 8, requires_grad=True)
    out = spectral_linear(x, y, randn(72, 8), s, randn(8, 600), 2.0, STARTS)
    out.backward(randn(90, 72))


def products() -> None:
    segment_products(randn(1100, 48), randn(1100, 48), torch.tensor([0, 23, 1100]))


def grouped() -> None:
    modules = [Module(randn(90, n), randn(90, m), randn(m, r), randn(r, n)) for m, n, r in [(72, 600, 8), (48, 80, 16)]]
    grouped_products(modules, STARTS)


def recomposed(dtype: torch.dtype, r: int, lengths: tuple[int, ...], wide: bool) -> Callable[[], None]:
    def run() -> None:
        products = []
        for length in lengths:
            t, scale = randn(r, r, dtype=torch.float64), torch.ones(r, dtype=torch.float64)
            for flat, basis in ((False, randn(length, r, dtype=dtype)), (True, randn(r, length, dtype=dtype))):
                products.append(Product(basis, t, scale, torch.empty_like(basis), flat, wide))
        recompose(products)

    return run


def grams(r: int, length: int) -> Callable[[], None]:
    def run() -> None:
        from spectral_fast.kernels.lowrank_svd.gpu import filled_rank, grams

        grams([randn(length, r), randn(72, r)], [randn(r, 72), randn(r, length)], filled_rank(r))

    return run


def sketched() -> None:
    labels = torch.tensor([3, -100, 70, 0, 1, 1])
    hashes = Hashes.draw(40, 2100, 300, seed=0)
    head_sketch(randn(6, 40), randn(6, 2100), labels, hashes, 5)


def svds() -> None:
    from spectral_fast.kernels.batched_svd.gpu import svd_launch

    svd_launch(randn(2, 13, 13, dtype=torch.float32))


def splined(method: str, base: torch.Tensor | None) -> Callable[[], None]:
    def run() -> None:
        # Every block has elements in every piece.
        x = torch.linspace(-2.9, 2.9, 2048).repeat(3)[:6000].view(60, 100).half().requires_grad_()
        parameters = [t.requires_grad_() for t in (torch.linspace(-3, 3, 5), torch.ones(1), torch.ones(1))]
        y = spline(x, *parameters, method=method, base=base)
        y.backward(torch.ones_like(y))

    return run


RUNS = {
    "spectral_linear": branch,
    "segment_products": products,
    "grouped_products": grouped,
    "recompose, bfloat16, resident": recomposed(torch.bfloat16, 24, (72, 2056), wide=False),
    "recompose, float16, streaming": recomposed(torch.float16, 40, (72, 200), wide=False),
    "recompose, float32, wide": recomposed(torch.float32, 24, (72, 200), wide=True),
    "gram, one tile": grams(24, 2120),
    "gram, tiles": grams(72, 80),
    "batched_svd": svds,
    "spline, piecewise": splined("piecewise", None),
    "spline, soft, with a base": splined("soft", randn(60, 100)),
    "head_sketch": sketched,
}


Counted = dict[str, list[tuple[traffic.Launch, Counter]]]


@pytest.fixture(scope="module")
def counted() -> Counted:
    """Every run's launches, each with what the interpreter did for it."""
    found: Counted = {}
    for name, run in RUNS.items():

        def around(launch: traffic.Launch, start: Callable[[], None], name: str = name) -> None:
            with counting() as count:
                start()
            found.setdefault(name, []).append((launch, count))

        with traffic.recorded(around):
            run()
    return found


@pytest.mark.parametrize("name", RUNS)
def test_what_a_kernel_loads_stores_and_multiplies_is_what_is_counted(name: str, counted: Counted) -> None:
    for launch, count in counted[name]:
        model = launch.traffic()
        assert (count.loaded, count.stored) == (model.loaded, model.written), launch.kernel
        assert count.flops == launch.flops(), launch.kernel


@pytest.mark.parametrize("name", RUNS)
def test_what_is_launched_is_what_is_compiled_ahead_of_time(name: str, counted: Counted) -> None:
    assert uncompiled([launch for launch, _ in counted[name]], "sm_90") == []


def test_a_launch_that_is_not_shipped_is_noticed(counted: Counted) -> None:
    first, _ = counted["segment_products"][0]
    other = replace(first, variant=replace(first.variant, warps=1))
    assert len(uncompiled([other], "sm_90")) == 1
    odd = replace(first, args=first.args | {"p_p": first["p_p"].double()})
    assert len(uncompiled([odd], "sm_90")) == 1


def test_every_model_is_compared(counted: Counted) -> None:
    assert {launch.kernel for launches in counted.values() for launch, _ in launches} == set(traffic.MODELS)


def test_what_moves_more_than_it_may_is_a_failure() -> None:
    good = roofline.Row("recompose", "one", traffic.Traffic(read=100), 0, roofline.Work(100, {}), 1.1)
    bad = roofline.Row("recompose", "another", traffic.Traffic(read=111), 0, roofline.Work(100, {}), 1.11)
    free = roofline.Row("segment_products", "one", traffic.Traffic(read=200), 0, roofline.Work(100, {}), 2.0)
    [failure] = roofline.failures([good, bad, free])
    assert failure == "recompose, another: 1.110 times the least bytes, at most 1.1 are allowed"


def test_launches_are_recorded_without_touching_memory() -> None:
    basis, t = randn(72, 16, dtype=torch.bfloat16), torch.eye(16, dtype=torch.float64)
    out = torch.full_like(basis, 7)
    launches = roofline.launched(lambda: recompose([Product(basis, t, t[0], out, False, False)]))
    assert [launch.kernel for launch in launches] == ["transform_kernel", "resident_kernel"]
    assert (out == 7).all()
    row = roofline.row("recompose", "one", [(launches, roofline.Work(2 * basis.nbytes, {}))])
    assert row.traffic.written == basis.nbytes + 3 * 16 * 16 * 2

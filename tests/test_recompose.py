"""Factors times small transforms: each backend against float64 products, within the rounding that it may have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, native_missing, registered
from spectral_fast.kernels.recompose import Product, recompose

# Triton's interpreter computes with numpy, which warns of what the tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Around the tiles of 6, 8 and 12 rows, the vectors of 2 to 16 lanes, the pieces of 64 rows and 128 columns.
ONE = torch.ones(1, 1, dtype=torch.float64)
LENGTHS = (0, 1, 5, 6, 63, 64, 65, 127, 128, 129, 300)
RANKS = ((1, 1), (2, 3), (7, 8), (8, 7), (16, 16), (17, 33), (64, 64), (67, 1), (0, 3), (3, 0), (130, 131))


@pytest.fixture(params=["cpu", "gpu", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend by force, so that a test of one cannot pass by way of another."""
    if request.param == "cpu" and native_missing() and os.environ.get("CI") != "true":
        pytest.skip(str(native_missing()))
    if request.param == "gpu" and (os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None):
        pytest.skip("wants Triton's interpreter")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)


def interpreted() -> bool:
    """Whether the backend under test is Triton's interpreter, which takes milliseconds for a few rows."""
    return os.environ[ENVIRONMENT_VARIABLE] == "gpu"


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills torch.empty with NaN: a result that was never written cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(length: int, k: int, r: int, flat: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + 1000 * k + r)
    basis = torch.randn((k, length) if flat else (length, k), generator=generator).to(dtype)
    return basis, torch.randn(k, r, generator=generator, dtype=torch.float64)


def scales(transform: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, transform.shape[1], dtype=torch.float64)


def check(product: Product, basis: Tensor) -> None:
    """`basis` is what product.basis held before."""
    _, transform, scale, out, flat, wide = product
    scaled = transform * scale
    left, right = (scaled.mT, basis.double()) if flat else (basis.double(), scaled)
    # Sums of k terms in the inner type (the transform is rounded to it, too), then one rounding to the outer.
    inner = torch.finfo(torch.float64 if wide else torch.float32)
    terms = left.abs() @ right.abs()
    outer = torch.finfo(out.dtype)
    inside = (left.shape[1] + 2) * inner.eps * terms
    hop = torch.finfo(torch.float32).eps if wide and out.itemsize == 2 else 0.0  # from float64 by way of float32
    exact = (left @ right).abs()
    bound = inside + (outer.eps / 2 + hop) * (exact + inside) + outer.smallest_normal * outer.eps
    assert ((out.double() - left @ right).abs() <= bound).all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_every_shape_are_right_and_may_come_in_one_call(dtype: torch.dtype, flat: bool, wide: bool) -> None:
    products = []
    for length in (0, 65) if interpreted() else LENGTHS:
        for k, r in ((2, 3), (16, 16), (33, 17), (0, 3), (3, 0)) if interpreted() else RANKS:
            basis, transform = operands(length, k, r, flat, dtype)
            out = torch.empty((r, length) if flat else (length, r), dtype=dtype)
            products.append(Product(basis, transform, scales(transform), out, flat, wide))
    assert recompose(products) == [True] * len(products)
    for product in products:
        check(product, product.basis)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_may_have_another_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for flat in (False, True):
        basis, transform = operands(131, 9, 9, flat, dtype)
        product = Product(basis, transform, scales(transform), torch.empty(basis.shape, dtype=out_dtype), flat, True)
        assert recompose([product]) == [True]
        check(product, basis)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_may_be_overwritten_in_place(dtype: torch.dtype, flat: bool) -> None:
    for length, r in ((300, 16), (131, 67), (5, 8)):
        basis, transform = operands(length, r, r, flat, dtype)
        before = basis.clone()
        product = Product(basis, transform, scales(transform), basis, flat, False)
        assert recompose([product]) == [True]
        check(product, before)


def test_bases_and_transforms_need_not_be_contiguous() -> None:
    basis, transform = operands(131, 9, 9, False, torch.float32)
    product = Product(
        basis.mT.contiguous().mT, transform.mT.contiguous().mT, scales(transform), torch.empty(131, 9), False, True
    )
    assert recompose([product]) == [True]
    check(product, basis)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_value_is_widened_exactly_and_narrowed_to_itself(dtype: torch.dtype) -> None:
    """Subnormal numbers and both zeros too."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()][:: 127 if interpreted() else 1]
    for flat in (False, True):
        column = finite[None] if flat else finite[:, None]
        for wide in (False, True):
            out = torch.empty_like(column)
            [ok] = recompose([Product(column, ONE, ONE[0], out, flat, wide)])
            assert ok
            assert torch.equal(out, column)
            exact = torch.empty(column.shape)
            recompose([Product(column, ONE, ONE[0], exact, flat, wide)])
            assert torch.equal(exact, column.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_between_two_sixteen_bit_values_are_rounded_to_nearest_ties_to_even(dtype: torch.dtype) -> None:
    every = torch.arange(0, 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].double()[-700 if interpreted() else 0 :]
    middles = (finite[1:] + finite[:-1]) / 2
    quarters = (finite[1:] * 3 + finite[:-1]) / 4
    for values in (middles, quarters, -middles):
        column = values.float()[:, None]  # exact: bfloat16 and float16 have fewer digits, and a wide enough float32
        column = column[column[:, 0].double() == values]
        out = torch.empty(column.shape, dtype=dtype)
        recompose([Product(column, ONE, ONE[0], out, False, False)])
        assert torch.equal(out, column.to(dtype))
        assert len(column) > 0.9 * len(values)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 64, 130])
def test_values_that_are_not_finite_are_reported_for_their_product_alone(
    dtype: torch.dtype, flat: bool, place: int
) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        good = operands(131, 7, 7, flat, dtype)
        basis, transform = operands(131, 7, 7, flat, dtype)
        (basis.mT if flat else basis)[place, 3] = bad
        products = [
            Product(x, t, scales(t), torch.empty_like(x), flat, False) for x, t in (good, (basis, transform), good)
        ]
        assert recompose(products) == [True, False, True]


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("word", [0x7F800001, 0x7FBFFFFF, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
def test_no_payload_of_a_nan_passes_as_a_number(out_dtype: torch.dtype, word: int) -> None:
    nan = torch.tensor([word]).to(torch.uint32).view(torch.float32)
    assert nan.isnan()
    for basis in (nan.repeat(40, 1), nan.double().repeat(40, 1)):
        for flat in (False, True):
            x = basis.mT.contiguous() if flat else basis
            out = torch.empty(x.shape, dtype=out_dtype)
            one = torch.ones(1, 1, dtype=torch.float64)
            for wide in (False, True):
                assert recompose([Product(x, one, scales(one), out, flat, wide)]) == [False]
                assert out.isnan().all()


def test_memory_that_another_product_needs_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")  # the reference forms one product after the other
    identity = torch.eye(3, dtype=torch.float64)
    memory = torch.zeros(30, 3)
    with pytest.raises(ValueError, match=r"products 0 and 0 share memory"):
        recompose([Product(memory[:20], identity, scales(identity), memory[1:21], False, False)])
    with pytest.raises(ValueError, match=r"products 0 and 1 share memory"):
        recompose([Product(memory, identity, scales(identity), memory, False, False)] * 2)
    with pytest.raises(ValueError, match=r"share memory"):
        recompose(
            [
                Product(memory, identity, scales(identity), torch.empty(30, 3), False, False),
                Product(memory, identity, scales(identity), memory, False, False),
            ]
        )
    outs = [torch.empty(30, 3), torch.empty(30, 3)]
    assert recompose([Product(memory, identity, scales(identity), out, False, False) for out in outs]) == [True, True]


def test_autograd_notices_that_a_tensor_was_overwritten() -> None:
    x = torch.ones(4, 2, requires_grad=True)
    y = x.exp()
    recompose([Product(y.detach(), ONE.expand(2, 2), torch.ones(2, dtype=torch.float64), y.detach(), False, False)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_result_beyond_the_range_of_its_dtype_is_reported() -> None:
    basis = torch.full((40, 2), 60000.0, dtype=torch.float16)
    double = torch.eye(2, dtype=torch.float64) * 2
    for wide in (False, True):
        assert recompose([Product(basis, double, scales(double), torch.empty_like(basis), False, wide)]) == [False]
        assert recompose([Product(basis, double, scales(double), torch.empty(40, 2), False, wide)]) == [True]


def test_nothing_to_do_is_not_an_error() -> None:
    assert recompose([]) == []


def test_arguments_that_do_not_fit_are_refused() -> None:
    basis, transform = operands(20, 4, 4, False, torch.float32)
    out, scale = torch.empty(20, 4), scales(transform)
    with pytest.raises(
        ValueError, match=r"a tall basis \(20, 4\), transform \(3, 4\), scale \(4,\) and out \(20, 4\) do"
    ):
        recompose([Product(basis, transform[:3], scale, out, False, False)])
    with pytest.raises(ValueError, match=r"a flat basis \(20, 4\)"):
        recompose([Product(basis, transform, scale, out, True, False)])
    with pytest.raises(ValueError, match=r"scale \(3,\)"):
        recompose([Product(basis, transform, scale[:3], out, False, False)])
    with pytest.raises(ValueError, match="must be matrices, and scale a vector"):
        recompose([Product(basis[0], transform, scale, out, False, False)])
    with pytest.raises(ValueError, match=r"out must be contiguous, got strides \(1, 20\)"):
        recompose([Product(basis, transform, scale, torch.empty(4, 20).mT, False, False)])
    with pytest.raises(TypeError, match=r"got torch.float32, torch.float32, torch.float32, torch.float64"):
        recompose([Product(basis, transform.float(), scale, out, False, False)])
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        recompose([Product(basis.long(), transform, scale, out, False, False)])


def edges() -> list[tuple[torch.dtype, bool, bool, int, int]]:
    """Lengths around a tile, a program's tiles and one row, for each kernel and class of ranks on a GPU."""
    narrow = [(dtype, False, r) for dtype in (torch.bfloat16, torch.float16) for r in (16, 32, 64, 128)]
    wide = [(torch.float32, True, r) for r in (16, 64, 128)]
    tile = {(False, 16): 256, (False, 32): 128, (False, 64): 64, (False, 128): 128}
    return [
        (dtype, flat, wide_sums, r, tile.get((wide_sums, r), min(4096 // r, 128)) + more)
        for dtype, wide_sums, r in narrow + wide
        for flat, more in ((False, -1), (False, 1), (True, 0), (True, 8))
    ]


@pytest.mark.parametrize(("dtype", "flat", "wide", "r", "length"), edges())
def test_rows_at_the_edge_of_a_tile_are_neither_lost_nor_shared(
    dtype: torch.dtype, flat: bool, wide: bool, r: int, length: int
) -> None:
    """In place, where a row that two programs shared would be wrong."""
    basis, transform = operands(length, r, r, flat, dtype)
    before = basis.clone()
    product = Product(basis, transform, scales(transform), basis, flat, wide)
    assert recompose([product]) == [True]
    check(product, before)


def test_a_program_multiplies_all_its_tiles_and_the_next_one_goes_on_behind_them() -> None:
    for flat in (False, True):
        basis, transform = operands(16 * 256 + 8, 16, 16, flat, torch.bfloat16)
        before = basis.clone()
        product = Product(basis, transform, scales(transform), basis, flat, False)
        assert recompose([product]) == [True]
        check(product, before)


def test_terms_of_very_different_size_keep_the_digits_of_float32() -> None:
    """A transform rounded to sixteen bits, or scaled to fit them, would lose the small ones."""
    for dtype in (torch.bfloat16, torch.float16):
        basis, transform = operands(64, 16, 16, False, dtype)
        size = torch.logspace(-6, 4, 16, dtype=torch.float64)
        basis = (basis.double() / size.clamp(1e-4, 1e3)).to(dtype)
        transform = transform * size[:, None]
        product = Product(basis, transform, scales(transform), torch.empty(64, 16, dtype=dtype), False, False)
        assert recompose([product]) == [True]
        check(product, basis)


def test_a_gpu_refuses_transforms_larger_than_its_kernels() -> None:
    [backend] = [x for x in registered()["recompose"] if x.name == "gpu"]
    basis, transform = operands(20, 300, 4, False, torch.float32)
    product = Product(basis, transform, scales(transform), torch.empty(20, 4), False, False)
    assert backend.refuses([product]) == "a transform has a side of 300; kernels are compiled for up to 256"

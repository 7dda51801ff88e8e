"""Frozen products in float32: as exact as the dtype allows, and only where they are wanted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spectral_fast.calibration.packed import products
from spectral_fast.calibration.packed.products import ROWS, WideProducts


@pytest.fixture(autouse=True)
def _slow_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "float32_is_faster", lambda: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widened", [products.WIDENED, 10 * 48])
def test_values_and_gradients_are_the_exact_ones_rounded_once(
    dtype: torch.dtype, bias: bool, widened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WIDENED", widened)  # as a whole, and in blocks of ten rows
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, ROWS, 48, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(33, 48, generator=generator).to(dtype)
    b = torch.randn(33, generator=generator).to(dtype) if bias else None
    dy = torch.randn(2, ROWS, 33, generator=generator).to(dtype)
    for _ in range(2):  # the second time in memory that has been used
        x.grad = None
        with WideProducts():
            y = F.linear(x, weight, b)
        assert "_FrozenLinear" in type(y.grad_fn.next_functions[0][0]).__name__
        y.backward(dy)
        exact = F.linear(x.detach().double(), weight.double(), None if b is None else b.double())
        # float32 sums of 48 products, then half a unit of the dtype
        bound = 49 * 2**-24 * F.linear(x.detach().double().abs(), weight.double().abs()) + 3 * 2**-24
        unit = torch.finfo(dtype).eps / 2
        assert ((y.double() - exact).abs() <= bound + unit * (exact.abs() + bound)).all()
        exact = dy.double() @ weight.double()
        bound = 34 * 2**-24 * dy.double().abs() @ weight.double().abs() + 3 * 2**-24
        assert ((x.grad.double() - exact).abs() <= bound + unit * (exact.abs() + bound)).all()


def test_the_output_may_be_changed_in_place() -> None:
    x = torch.randn(2, ROWS, 48).bfloat16().requires_grad_()
    with WideProducts():
        y = F.linear(x, torch.ones(33, 48).bfloat16())
    y *= 2
    y.sum().backward()
    assert (x.grad == 66).all()


def test_nothing_but_the_weight_is_kept() -> None:
    x = torch.randn(ROWS, 48).bfloat16().requires_grad_()
    weight = torch.randn(33, 48).bfloat16()
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t),
        WideProducts(),
    ):
        F.linear(x, weight)
    assert kept == [weight.data_ptr()]


@pytest.mark.parametrize("why", ["float32", "few rows", "trainable weight", "mixed dtypes", "outside"])
def test_all_else_is_left_to_torch(why: str) -> None:
    x, weight = torch.randn(ROWS, 48).bfloat16().requires_grad_(), torch.randn(33, 48).bfloat16()
    if why == "few rows":
        x = x[: ROWS - 1].detach().requires_grad_()
    if why == "trainable weight":
        weight.requires_grad_()
    if why in ("float32", "mixed dtypes"):
        weight = weight.float()
    if why == "float32":
        x = x.detach().float().requires_grad_()
    if why == "outside":
        assert "_FrozenLinear" not in str(F.linear(x, weight).grad_fn.next_functions)
        return
    with WideProducts():
        if why == "mixed dtypes":
            with pytest.raises(RuntimeError):
                F.linear(x, weight)
        else:
            assert "_FrozenLinear" not in str(F.linear(x, weight).grad_fn.next_functions)

"""Tensors that read otherwise than they lie, factors at the end of float64's range, cards that nobody compiled for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from spectral_fast.backends import ENVIRONMENT_VARIABLE
from spectral_fast.kernels import gpu
from spectral_fast.kernels.lowrank_svd import lowrank_svd
from spectral_fast.kernels.recompose import Product, recompose

B, A = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((50, 8), (8, 40)))
ONE, EYE = torch.ones(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    return name


@pytest.mark.usefixtures("backend")
def test_a_lazy_negation_is_carried_out() -> None:
    [negated], [plain] = lowrank_svd([torch._neg_view(B)], [A]), lowrank_svd([-B], [A])
    assert torch.equal(negated.t_b, plain.t_b)
    out = torch.empty(50, 8)
    assert recompose([Product(torch._neg_view(B), EYE, ONE, out, False, True)]) == [True]
    assert torch.equal(out, -B)


def test_kernels_that_read_addresses_alone_refuse_a_lazy_negation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpu")
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    assert gpu.refuses([B]) is None
    assert "negated lazily" in str(gpu.refuses([B, torch._neg_view(B)]))


@pytest.mark.usefixtures("backend")
def test_float64_factors_whose_product_overflows_are_refused_by_name() -> None:
    b, a = B.double() * 1e200, A.double() * 1e200
    with pytest.raises(ValueError, match="down: the product of B and A is beyond the range of float64"):
        lowrank_svd([b], [a], ["down"])
    with pytest.raises(ValueError, match="down: the product"):
        lowrank_svd([b * 1e107], [a / 1e190], ["down"])


def test_the_gram_route_passes_opcheck_as_an_op() -> None:
    op = torch.ops.spectral_fast.gram_svd.default
    torch.library.opcheck(op, ([B, B[:20, :4].contiguous()], [A, A[:4, :9].contiguous()]))
    torch.library.opcheck(op, ([], []))


def products(*pairs: tuple[torch.Tensor, torch.Tensor]) -> Sequence[Product]:
    return [Product(basis, EYE, ONE, out, False, True) for basis, out in pairs]


@pytest.mark.usefixtures("backend")
def test_products_that_would_overwrite_each_other_are_refused() -> None:
    memory, out = torch.zeros(70, 8), torch.zeros(50, 8)
    for wrong in (
        products((memory[:50], memory[8:58])),  # its own basis, shifted
        products((B, out), (B, out)),
        products((B, memory[:50]), (B, memory[20:])),
        products((B, memory[:50]), (memory[:50], out)),
    ):
        with pytest.raises(ValueError, match=r"products \d and \d share memory that one of them writes"):
            recompose(wrong)
    assert recompose(products((B, memory[:50]), (B, out))) == [True, True]
    assert recompose(products((memory[:50], memory[:50]), (memory[50:], memory[50:]))) == [True, True]


@pytest.mark.parametrize(
    ("capability", "taken"),
    [((8, 0), "sm_80"), ((8, 6), "sm_120"), ((9, 0), "sm_90"), ((10, 3), "sm_120"), ((7, 5), None), ((11, 0), None)],
)
def test_a_card_that_no_kernel_was_compiled_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], taken: str | None
) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    reason = gpu.refuses()
    if taken is None:
        assert f"sm_{capability[0]}{capability[1]}; kernels are compiled for sm_80" in str(reason)
    else:
        assert reason is None
        assert gpu.architecture(torch.device("cuda")) == taken

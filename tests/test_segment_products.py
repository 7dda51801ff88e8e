"""The segmented sums of p ⊙ q: each backend against float64 sums."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends, native_missing
from spectral_fast.kernels.sensitivity import segment_products

STARTS = {
    "one": [0, 301],
    "samples": [0, 1, 64, 65, 129, 301],
    "empty ones": [0, 0, 0, 150, 150, 301, 301],
}


@pytest.fixture(params=["cpu", "gpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend by force, so that a test of one cannot pass by way of another."""
    name: str = request.param
    if name == "cpu" and native_missing() and os.environ.get("CI") != "true":
        pytest.skip(str(native_missing()))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    return name


def projections(tokens: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + r)
    p, q = torch.randn(2, tokens, r, generator=generator).to(dtype)
    return p, q


def check(p: Tensor, q: Tensor, starts: list[int], got: Tensor) -> None:
    terms = p.double() * q.double()
    assert got.dtype == torch.float32
    for t, (begin, end) in enumerate(itertools.pairwise(starts)):
        # The standard bound: as many roundoffs of the terms' sum as there are additions and a product.
        bound = (end - begin + 1) * torch.finfo(torch.float32).eps * terms[begin:end].abs().sum(0)
        assert ((got[t].double() - terms[begin:end].sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("r", [0, 1, 3, 7, 8, 15, 16, 17, 31, 64, 67, 130])
def test_the_sums_are_right_for_every_rank_dtype_and_segmentation(backend: str, r: int, dtype: torch.dtype) -> None:
    p, q = projections(301, r, dtype)
    for starts in STARTS.values():
        check(p, q, starts, segment_products(p, q, torch.tensor(starts)))
    check(p, q, [0, 301], segment_products(p, q))
    assert chosen_backends()["sensitivity"] == backend


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 64, 65])
def test_few_tokens_are_no_special_case(tokens: int) -> None:
    for r in (1, 5, 16, 20):
        p, q = projections(tokens, r, torch.float32)
        check(p, q, [0, tokens], segment_products(p, q))


@pytest.mark.usefixtures("backend")
def test_many_tokens_lose_no_more_than_short_runs_do() -> None:
    """A plain running sum in float32 would be off by a thousand eps."""
    p = torch.full((100_000, 3), 0.1)
    q = torch.ones(100_000, 3)
    [g] = segment_products(p, q)
    wanted = float(p[0, 0]) * 100_000
    # Half an eps for every addition: 64 within a run, and one per run, each of at most the whole sum.
    bound = (64 + 100_000 / 64) / 2 * torch.finfo(torch.float32).eps
    assert (g - wanted).abs().max() <= bound * wanted


def test_the_bits_do_not_depend_on_the_number_of_threads_nor_on_the_other_segments() -> None:
    p, q = projections(40_000, 67, torch.bfloat16)
    starts = torch.arange(0, 40_001, 1000)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(segment_products(p, q, starts))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][7:8], segment_products(p[7000:8000], q[7000:8000]))


def test_float64_projections_give_float64_sums() -> None:
    p, q = (x.double() for x in projections(50, 5, torch.float32))
    assert torch.allclose(segment_products(p, q), (p * q).sum(0)[None], rtol=0, atol=1e-14)


def test_projections_need_not_be_contiguous() -> None:
    p, q = projections(60, 10, torch.float32)
    assert torch.equal(segment_products(p.mT.contiguous().mT, q[:, :]), segment_products(p, q))


def test_arguments_that_do_not_fit_are_refused() -> None:
    p, q = projections(10, 4, torch.float32)
    with pytest.raises(ValueError, match=r"of one shape, got \(10, 4\), \(10, 3\)"):
        segment_products(p, q[:, :3])
    with pytest.raises(TypeError, match=r"got torch\.float32, torch\.bfloat16"):
        segment_products(p, q.bfloat16())
    with pytest.raises(TypeError, match="starts must be a vector of int64"):
        segment_products(p, q, torch.tensor([0.0, 10.0]))
    for wrong in ([0, 9], [1, 10], [0, 7, 5, 10], [0, 11, 10]):
        with pytest.raises(ValueError, match="starts must go from 0 to 10"):
            segment_products(p, q, torch.tensor(wrong))


def test_the_op_passes_opcheck() -> None:
    p, q = projections(10, 4, torch.float32)
    torch.library.opcheck(torch.ops.spectral_fast.segment_products.default, (p, q, torch.tensor([0, 3, 10])))


def test_many_tokens_of_one_sign_lose_little() -> None:
    p = torch.full((400_000, 3), 1.1)
    q = torch.full((400_000, 3), 0.7)
    [g] = segment_products(p, q)
    exact = 400_000 * (p[0].double() * q[0].double())
    # Two sums, neither longer than the root of the number of tokens.
    assert ((g - exact).abs() <= 2 * 634 * torch.finfo(torch.float32).eps / 2 * exact).all()


def test_the_sums_have_no_gradient() -> None:
    p = torch.ones(4, 2, requires_grad=True)
    assert not segment_products(p, p).requires_grad

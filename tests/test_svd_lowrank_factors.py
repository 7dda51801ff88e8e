"""The SVD of a product of factors: torch's conventions, and torch's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_fast import svd_lowrank_factors

EPS32 = 2.0**-23


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "r", "n"), [(40, 4, 30), (6, 9, 7), (1, 1, 5), (5, 8, 3)])
def test_the_result_is_torchs_cut_to_the_rank(dtype: torch.dtype, m: int, r: int, n: int) -> None:
    b, a = randn(m, r, dtype=dtype), randn(r, n, dtype=dtype, seed=1)
    found = svd_lowrank_factors(b, a)
    k = min(m, r, n)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in found] == [wide] * 3
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((m, k), (k,), (k, n))
    product = b.double() @ a.double()
    bound = 30 * r * EPS32 * (b.double().norm() * a.double().norm()).item()
    assert (torch.linalg.svdvals(product)[:k] - found.S.double()).abs().max() <= bound
    assert ((found.U.double() * found.S.double()) @ found.Vh.double() - product).norm() <= bound
    for basis in (found.U.double(), found.Vh.mT.double()):
        assert (basis.mT @ basis - torch.eye(k, dtype=torch.float64)).norm() <= 30 * r * EPS32


def test_batches_are_broadcast() -> None:
    b, a = randn(2, 1, 7, 3), randn(4, 3, 5, seed=1)
    u, s, vh = svd_lowrank_factors(b, a)
    assert (u.shape, s.shape, vh.shape) == ((2, 4, 7, 3), (2, 4, 3), (2, 4, 3, 5))
    torch.testing.assert_close((u * s.unsqueeze(-2)) @ vh, b @ a, rtol=0, atol=1e-13)


def test_zero_factors_give_zeros_and_orthonormal_vectors() -> None:
    u, s, vh = svd_lowrank_factors(torch.zeros(9, 4), torch.zeros(4, 6))
    assert not s.any()
    torch.testing.assert_close(u.mT @ u, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.mT, torch.eye(4), rtol=0, atol=1e-5)


def functions(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, ...]:
    """Of the SVD, such as do not depend on signs."""
    return s, (u * s.unsqueeze(-2))[..., :2] @ vh[..., :2, :], u.abs(), vh.abs()


@pytest.mark.parametrize(("m", "r", "n"), [(7, 3, 5), (5, 8, 4)])
def test_gradients_are_those_of_torch_and_of_finite_differences(m: int, r: int, n: int) -> None:
    factors = randn(2, m, r).requires_grad_(), randn(2, r, n, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda b, a: functions(*svd_lowrank_factors(b, a)), factors)
    k = min(m, r, n)
    found = torch.autograd.grad(sum(x.square().sum() for x in functions(*svd_lowrank_factors(*factors))[:2]), factors)
    u, s, vh = torch.linalg.svd(factors[0] @ factors[1], full_matrices=False)
    expected = torch.autograd.grad(
        sum(x.square().sum() for x in functions(u[..., :k], s[..., :k], vh[..., :k, :])[:2]), factors
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_s_alone_is_finite_where_values_are_zero_or_equal() -> None:
    b, a = torch.eye(6, 4).requires_grad_(), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).requires_grad_()
    svd_lowrank_factors(b, a).S.sum().backward()
    assert b.grad is not None
    assert a.grad is not None
    assert b.grad.isfinite().all()
    assert a.grad.isfinite().all()


def test_a_gradient_that_dead_ranks_hide_is_nan_and_not_a_wrong_number() -> None:
    b, a = torch.zeros(9, 4).requires_grad_(), randn(4, 7, dtype=torch.float32)
    u, s, vh = svd_lowrank_factors(b, a)
    ((u * s) @ vh).sum().backward()  # by b it is 1 Aᵀ, of which B = 0 has left no trace in U, S and Vh
    assert b.grad is not None
    assert b.grad.isnan().any()


@pytest.mark.parametrize(
    ("b", "a", "error", "words"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), ValueError, r"share r; got \(3, 2\) and \(3, 4\)"),
        (torch.ones(3), torch.ones(3, 4), ValueError, r"b must be a matrix .* got shape \(3,\)"),
        (torch.ones(3, 0), torch.ones(0, 4), ValueError, "with entries"),
        (torch.ones(2, 3, 2), torch.ones(3, 2, 4), ValueError, "batches of b"),
        (torch.ones(3, 2).int(), torch.ones(2, 4), TypeError, "float"),
        ([[1.0]], torch.ones(1, 4), TypeError, "b must be a tensor; got list"),
        (torch.ones(3, 2), torch.full((2, 4), torch.nan), ValueError, "A holds a NaN"),
    ],
)
def test_what_cannot_be_meant_is_refused(b: Tensor, a: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        svd_lowrank_factors(b, a)

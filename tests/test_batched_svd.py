"""SVDs of many small matrices: every backend keeps what the op promises, for matrices that cores may be."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, native_missing
from spectral_fast.kernels.batched_svd import batched_svd

RATIO = 30
RANKS = (1, 2, 3, 7, 8, 9, 17, 64, 67, 130)
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend by force, so that a test of one cannot pass by way of another."""
    if request.param == "cpu" and native_missing() and os.environ.get("CI") != "true":
        pytest.skip(str(native_missing()))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills torch.empty with NaN: a result that was never written cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def matrices(r: int) -> dict[str, Tensor]:
    """(r, r) float64 each."""
    generator = torch.Generator().manual_seed(r)
    plain = torch.randn(r, r, dtype=torch.float64, generator=generator)
    q, _ = torch.linalg.qr(plain)
    p, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64, generator=generator))
    dead, repeated = plain.clone(), plain.clone()
    dead[r // 2] = 0
    repeated[:, -1] = repeated[:, 0]
    return {
        "plain": plain,
        "zero": torch.zeros(r, r, dtype=torch.float64),
        "identity": torch.eye(r, dtype=torch.float64),
        "equal singular values": 3 * q,
        "condition 1e4": (q * torch.logspace(0, -4, r, dtype=torch.float64)) @ p,
        "condition 1e8": (q * torch.logspace(0, -8, r, dtype=torch.float64)) @ p,
        "condition 1e20": (q * torch.logspace(0, -20, r, dtype=torch.float64)) @ p,
        "dead row": dead,
        "repeated column": repeated,
        "rank one": torch.outer(plain[0], plain[-1]),
        "triangular": plain.triu(),
        "large": plain * 1e30,
        "small": plain * 1e-30,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
def test_vectors_are_orthogonal_values_sorted_and_the_product_is_the_matrix(r: int, dtype: torch.dtype) -> None:
    kinds = matrices(r)
    x = torch.stack(list(kinds.values())).to(dtype)
    u, s, vh = (y.double() for y in batched_svd(x))
    bound = RATIO * r * torch.finfo(dtype).eps
    assert (s >= 0).all()
    assert (s.diff(dim=-1) <= 0).all()
    eye = torch.eye(r, dtype=torch.float64)
    for i, kind in enumerate(kinds):
        # Scaled by a power of two, so that the oracle's squares stay in range.
        scale = 2.0 ** -torch.frexp(x[i].double().abs().max()).exponent
        matrix, values = x[i].double() * scale, s[i] * scale
        size = torch.linalg.matrix_norm(matrix, 2)
        assert torch.linalg.norm(u[i].mT @ u[i] - eye) <= bound, kind
        assert torch.linalg.norm(vh[i] @ vh[i].mT - eye) <= bound, kind
        assert torch.linalg.norm((u[i] * values) @ vh[i] - matrix) <= bound * size, kind
        assert (values - torch.linalg.svdvals(matrix)).abs().max() <= bound * size, kind


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (0, 0, 0)])
def test_an_empty_batch_gives_empty_results(shape: tuple[int, ...]) -> None:
    u, s, vh = batched_svd(torch.empty(shape))
    assert (u.shape, s.shape, vh.shape) == (shape, shape[:2], shape)


def test_a_batch_that_is_not_contiguous_is_taken_as_it_reads() -> None:
    x = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for view in (x.mT, x.transpose(0, 1)[:3, :3].transpose(0, 2), x[::2]):
        for got, wanted in zip(batched_svd(view), batched_svd(view.contiguous()), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused_by_its_number(bad: float) -> None:
    x = torch.ones(4, 3, 3)
    x[2, 1, 0] = bad
    with pytest.raises(ValueError, match="matrix 2 of x holds a NaN or an infinity"):
        batched_svd(x)


def test_what_is_no_batch_of_square_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"square matrices \(batch, r, r\), got \(3, 4, 5\)"):
        batched_svd(torch.ones(3, 4, 5))
    with pytest.raises(ValueError, match=r"got \(4, 4\)"):
        batched_svd(torch.ones(4, 4))
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
        batched_svd(torch.ones(1, 4, 4, dtype=torch.bfloat16))


def test_the_op_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.spectral_fast.batched_svd.default, (torch.randn(2, 5, 5, dtype=torch.float64),))


def test_a_gradient_is_neither_needed_nor_promised_and_a_lazy_negation_is_carried_out() -> None:
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = batched_svd(x.clone().requires_grad_())
    assert not s.requires_grad
    for got, wanted in zip(batched_svd(torch._neg_view(-x)), (u, s, vh), strict=True):
        assert torch.equal(got, wanted)

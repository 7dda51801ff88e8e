"""The Gram route on a GPU, by Triton's interpreter: what the conformance tests of test_lowrank_svd.py do not show."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from test_lowrank_svd import SHAPES, check_contract, factors, needs_interpreter
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends, registered
from spectral_fast.kernels.lowrank_svd import lowrank_svd

# Triton's interpreter computes with numpy, which warns of what the tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "condition"),
    [*product([x for x in SHAPES if x[1] <= 16], (1, 1e4, 1e8)), *product([x for x in SHAPES if x[1] > 16], (1e4,))],
)
def test_the_contract_holds(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], condition: float) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpu")
    b, a = factors(*shape, condition)
    [result] = lowrank_svd([b], [a])
    check_contract(b, a, result)
    assert chosen_backends()["lowrank_svd"] == "gpu"


def gram_error(gram: Tensor, exact: Tensor) -> float:
    """The largest error of an element in units of d_i d_j, d² the diagonal."""
    d = exact.diagonal().sqrt()
    r = len(d)
    assert not gram[r:].any()
    assert not gram[:, r:].any()
    return float(((gram[:r, :r] - exact) / d / d[:, None]).abs().max())


# One of each kernel, over several chunks; of the first also several pieces, the last one short.
GRAMS = [
    ("sm_90", 2070, 5),
    ("sm_90", 150, 32),
    ("sm_90", 70, 64),
    ("sm_90", 90, 130),
    ("sm_120", 70, 7),
    ("sm_120", 20, 40),
]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("arch", "length", "r"), GRAMS)
def test_gram_matrices_of_a_gpu_are_as_good_as_float64(
    monkeypatch: pytest.MonkeyPatch, arch: str, length: int, r: int, dtype: torch.dtype
) -> None:
    from spectral_fast.kernels.lowrank_svd import gpu

    monkeypatch.setattr(gpu, "architecture", lambda _: arch)
    b, a = (x.to(dtype) for x in factors(length, r, length + 1, 1e3))
    [(gram_b, gram_a)] = gpu.grams([b], [a], gpu.filled_rank(r))
    # A sum of 64 in order, one over the chunks and one over the pieces, each of at most so many roundoffs.
    bound = (64 + 32 + 3) * torch.finfo(torch.float64).eps / 2
    assert gram_error(gram_b, b.double().mT @ b.double()) <= 2 * bound
    assert gram_error(gram_a, a.double() @ a.double().mT) <= 2 * bound
    assert torch.equal(gram_b, gram_b.mT)


@needs_interpreter
@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_a_gpu_keeps_the_factors_as_bases_up_to_condition_ten_thousand(
    monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    from spectral_fast.kernels.lowrank_svd import gpu

    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpu")
    monkeypatch.setattr(gpu, "architecture", lambda _: arch)
    b, a = factors(30, 8, 25, 1e4)
    [result] = lowrank_svd([b], [a])
    assert result.basis_b.data_ptr() == b.data_ptr()
    assert result.basis_a.data_ptr() == a.data_ptr()
    check_contract(b, a, result)


@needs_interpreter
def test_a_gpu_with_slow_float64_takes_the_qr_where_float32_has_too_small_a_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spectral_fast.kernels.lowrank_svd import gpu

    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpu")
    monkeypatch.setattr(gpu, "architecture", lambda _: "sm_120")
    for scale in (1e-20, 1e25):
        b, a = factors(12, 4, 10)
        b *= scale
        [result] = lowrank_svd([b], [a])
        assert result.basis_b.dtype == torch.float64
        check_contract(b, a, result)


@needs_interpreter
def test_the_loss_that_a_gpu_estimates_covers_the_true_one() -> None:
    from spectral_fast.kernels.lowrank_svd import gpu

    generator = torch.Generator().manual_seed(0)
    equal = torch.linspace(0.7, 1.3, 8)[:, None].repeat(1, 5000)
    equal[:, :8] += 100 * torch.randn(8, 8, generator=generator)  # rounding then goes one way
    pairs = [(equal.mT.contiguous(), equal), *(factors(120, 16, 100, condition) for condition in (1e2, 1e5))]
    for b, a in pairs:
        [(_, t_b, t_a)], [(loss, _)] = gpu.solve([b], [a])
        eye = torch.eye(len(t_b), dtype=torch.float64)
        for u in (b.double() @ t_b, a.double().mT @ t_a):
            assert (u.mT @ u - eye).norm().nan_to_num(nan=math.inf) <= 2 * loss


@needs_interpreter
def test_a_gpu_gives_the_same_bits_whatever_else_is_solved() -> None:
    from spectral_fast.kernels.lowrank_svd import gpu

    modules = [factors(*shape) for shape in ((61, 8, 97), (97, 12, 61), (2050, 8, 80))]
    together = gpu.grams([b for b, _ in modules], [a for _, a in modules], 16)
    for (b, a), gram in zip(modules, together, strict=True):
        assert torch.equal(gpu.grams([b], [a], 16)[0], gram)


def test_a_gpu_refuses_ranks_beyond_the_svd_of_cores() -> None:
    [backend] = [x for x in registered()["lowrank_svd"] if x.name == "gpu"]
    reason = "a module has rank 513; the SVD of cores is made for up to 512"
    assert backend.refuses([torch.empty(2, 513)], [torch.empty(513, 2)], ["x"]) == reason

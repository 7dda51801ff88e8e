"""The low-rank SVD: every backend against a dense float64 SVD of B A, within a test ratio of 30."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends, native_missing, registered
from spectral_fast.kernels.lowrank_svd import Factored, cpu, lowrank_svd, reference

# Triton's interpreter computes with numpy, which warns of what the tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

EPS = torch.finfo(torch.float32).eps
RATIO = 30
CONDITIONS = (1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8)
SHAPES = [(61, 1, 97), (97, 2, 61), (64, 8, 128), (101, 16, 103), (67, 31, 257), (16, 16, 16), (131, 64, 70)]

# In continuous integration a build that lost its native module must fail.
needs_native = pytest.mark.skipif(
    native_missing() is not None and os.environ.get("CI") != "true", reason=str(native_missing())
)


needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None, reason="wants Triton's interpreter"
)


@pytest.fixture(
    params=[pytest.param("cpu", marks=needs_native), pytest.param("gpu", marks=needs_interpreter), "reference"]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend by force, so that a test of one cannot pass by way of another."""
    name: str = request.param
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    if name == "gpu":
        from spectral_fast.kernels.lowrank_svd import gpu

        def svd(x: Tensor) -> tuple[Tensor, ...]:
            return *torch.linalg.svd(x), torch.full((len(x),), gpu.CONVERGED)

        # Triton's interpreter takes a second for the SVD of a core: test_lowrank_svd_gpu.py and its own tests.
        monkeypatch.setattr(gpu, "svd_launch", svd)
    return name


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills torch.empty with NaN: a result that was never written cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def conditioned(rows: int, r: int, condition: float, seed: int = 0) -> Tensor:
    """(rows, r) float64 with singular values from 1 down to 1 / condition, evenly in their logarithm."""
    generator = torch.Generator().manual_seed(seed + rows)
    q, _ = torch.linalg.qr(torch.randn(rows, r, dtype=torch.float64, generator=generator))
    p, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64, generator=generator))
    s = torch.logspace(0, -math.log10(condition), min(rows, r), dtype=torch.float64)
    return q * s @ p[: len(s)]


def factors(m: int, r: int, n: int, condition: float = 10.0) -> tuple[Tensor, Tensor]:
    return conditioned(m, r, condition).float(), conditioned(n, r, condition, seed=1).mT.float()


def vectors(f: Factored) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (n, r) in float64."""
    return f.basis_b.double() @ f.t_b, f.basis_a.double().mT @ f.t_a


def check_contract(b: Tensor, a: Tensor, f: Factored, eps: float = EPS) -> None:
    m, r, n = b.shape[0], b.shape[1], a.shape[1]
    u, v = vectors(f)
    b, a = b.double(), a.double()
    assert u.shape == (m, r)
    assert v.shape == (n, r)
    assert f.s.shape == (r,)
    assert f.s.dtype == f.t_b.dtype == f.t_a.dtype == torch.float64
    assert (f.s >= 0).all()
    assert (f.s.diff() <= 0).all()
    assert (b @ a - u * f.s @ v.mT).norm() <= RATIO * r * eps * b.norm() * a.norm()
    k = min(m, n, r)
    assert not u[:, k:].any()
    assert not v[:, k:].any()
    for x in (u[:, :k], v[:, :k]):
        assert (x.mT @ x - torch.eye(k, dtype=torch.float64)).norm() <= RATIO * r * eps
    assert not f.s[k:].any()
    # Forming b @ a errs by r float64 roundoffs of |b| |a|, far inside a bound in float32's.
    dense = torch.linalg.svdvals(b @ a)[:k]
    assert torch.allclose(f.s[:k], dense, rtol=0, atol=RATIO * r * eps * float(dense[:1].sum()))


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"], indirect=True)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("m", "r", "n"), SHAPES)
def test_the_contract_holds_for_every_condition(backend: str, m: int, r: int, n: int, condition: float) -> None:
    b, a = factors(m, r, n, condition)
    [result] = lowrank_svd([b], [a])
    check_contract(b, a, result)
    assert chosen_backends()["lowrank_svd"] == backend


@needs_native
@pytest.mark.parametrize("condition", [1e1, 1e4, 1e8])
@pytest.mark.parametrize("r", [128, 255, 512])
def test_the_contract_holds_for_large_ranks(monkeypatch: pytest.MonkeyPatch, r: int, condition: float) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    b, a = factors(600, r, 700, condition)
    [result] = lowrank_svd([b], [a])
    check_contract(b, a, result)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1, 1e3, 1e8])
def test_the_contract_holds_for_every_dtype(dtype: torch.dtype, condition: float) -> None:
    b, a = (x.to(dtype) for x in factors(150, 16, 90, condition))
    [result] = lowrank_svd([b], [a])
    check_contract(b, a, result, torch.finfo(torch.float64).eps if dtype == torch.float64 else EPS)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("b_scale", "a_scale"),
    [(1e30, 1e-30), (1e-25, 1e-25), (1e-42, 1.0), (1e18, 1e18), (1e-40, 1e-40), (1e37, 1e37)],
)
def test_scales_near_overflow_and_underflow_do_no_harm(b_scale: float, a_scale: float) -> None:
    b, a = factors(70, 8, 90)
    b, a = b * b_scale, a * a_scale  # some are subnormal in float32, and products exceed its range
    [result] = lowrank_svd([b], [a])
    check_contract(b, a, result)


@pytest.mark.usefixtures("backend")
def test_columns_of_very_different_length_do_no_harm() -> None:
    b, a = factors(200, 16, 90, 3.0)
    b *= torch.logspace(-12, 12, 16)
    [result] = lowrank_svd([b], [a])
    check_contract(b, a, result)


def degenerate() -> dict[str, tuple[Tensor, Tensor, int]]:
    """Factors of rank 8 with the number of directions that carry nothing."""
    b, a = factors(60, 8, 75)
    dead_b, dead_a, twins, parallel, close = b.clone(), a.clone(), b.clone(), a.clone(), a.clone()
    dead_b[:, 3] = 0
    dead_a[5] = 0
    twins[:, 4:] = twins[:, :4]
    parallel[1] = -4 * parallel[0]
    close[1] = close[0] * (1 + 2**-20)
    zero_b, zero_a = torch.zeros_like(b), torch.zeros_like(a)
    return {
        "a dead rank": (dead_b, a, 1),
        "two dead ranks": (dead_b, dead_a, 2),
        "B = 0": (zero_b, a, 8),
        "A = 0": (b, zero_a, 8),
        "A = B = 0": (zero_b, zero_a, 8),
        "duplicated columns": (twins, a, 4),
        "parallel rows": (b, parallel, 1),
        "almost parallel rows": (b, close, 0),
        "rank one": (b[:, :1].repeat(1, 8), a[:1].repeat(8, 1), 7),
    }


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", degenerate())
def test_ranks_that_carry_nothing_give_zeros_and_orthonormal_vectors(case: str) -> None:
    b, a, zeros = degenerate()[case]
    [result] = lowrank_svd([b], [a])
    check_contract(b, a, result)
    # Zero to the float64 roundoff of a QR and an SVD, which is nine digits below what float32 factors say.
    largest = float(b.double().norm() * a.double().norm())
    assert int((result.s <= RATIO * 8 * torch.finfo(torch.float64).eps * largest).sum()) == zeros


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("m", "r", "n"),
    [(5, 8, 40), (40, 8, 5), (3, 8, 4), (1, 4, 1), (0, 3, 7), (7, 3, 0), (0, 2, 0), (6, 0, 9)],
)
def test_directions_beyond_the_smaller_side_are_zero_throughout(m: int, r: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    [result] = lowrank_svd([b], [a])
    check_contract(b, a, result)


@pytest.mark.usefixtures("backend")
def test_modules_of_an_adapter_are_solved_together_whatever_their_shapes() -> None:
    modules = [
        factors(61, 8, 97),
        factors(97, 3, 61),
        factors(80, 8, 80, 1e8),
        factors(5, 8, 9),
        factors(50, 3, 70),
    ]
    modules[1] = (modules[1][0].bfloat16(), modules[1][1].half())
    modules[4] = (modules[4][0].double(), modules[4][1])
    results = lowrank_svd([b for b, _ in modules], [a for _, a in modules])
    for (b, a), result in zip(modules, results, strict=True):
        check_contract(b, a, result)
        [alone] = lowrank_svd([b], [a])
        assert torch.allclose(alone.s, result.s, rtol=0, atol=RATIO * len(alone.s) * EPS * float(alone.s[0]))


@pytest.mark.usefixtures("backend")
def test_an_adapter_without_modules_gives_no_spectra() -> None:
    assert lowrank_svd([], []) == []


@pytest.mark.usefixtures("backend")
def test_factors_need_not_be_contiguous_and_are_detached() -> None:
    b, a = factors(60, 8, 75)
    b_strided = b.mT.contiguous().mT.requires_grad_()
    a_strided = torch.stack([a, a], dim=-1)[..., 0]
    [result] = lowrank_svd([b_strided], [a_strided])
    check_contract(b, a, result)
    assert not any(x.requires_grad for x in result[:5])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_value_that_is_not_finite_is_an_error_that_names_the_module(bad: float, factor: str) -> None:
    good = factors(30, 4, 20)
    b, a = factors(30, 4, 20)
    (a if factor == "A" else b)[-1, -1] = bad
    with pytest.raises(ValueError, match=rf"layers.1.o_proj: {factor} holds a NaN or an infinity"):
        lowrank_svd([good[0], b], [good[1], a], ["layers.0.o_proj", "layers.1.o_proj"])


def test_factors_that_do_not_fit_are_refused_by_name() -> None:
    b, a = factors(30, 4, 20)
    with pytest.raises(ValueError, match=r"got 2, 1 and 1"):
        lowrank_svd([b, b], [a], ["x"])
    with pytest.raises(ValueError, match=r"x: B \(m, r\) and A \(r, n\) share r; got B \(30, 4\) and A \(3, 20\)"):
        lowrank_svd([b], [a[:3]], ["x"])
    with pytest.raises(ValueError, match=r"module 0: B must be a matrix, got shape \(30, 4, 1\)"):
        lowrank_svd([b[..., None]], [a])
    with pytest.raises(ValueError, match="module 0: B is on cpu and A on meta"):
        lowrank_svd([b], [a.to("meta")])
    with pytest.raises(TypeError, match=r"module 0: A must be a tensor of torch.bfloat16, .*; got torch.int64"):
        lowrank_svd([b], [a.long()])
    with pytest.raises(TypeError, match=r"module 0: B must be a tensor .*; got list"):
        lowrank_svd([b.tolist()], [a])


@needs_native
def test_the_cpu_backend_keeps_the_factors_as_bases_up_to_condition_one_thousand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the Gram route would be right, and never taken."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    for condition in (1, 1e3):
        b, a = factors(300, 32, 400, condition)
        [result] = lowrank_svd([b], [a])
        assert result.basis_b.data_ptr() == b.data_ptr()
        assert result.basis_a.data_ptr() == a.data_ptr()


@needs_native
def test_the_estimated_loss_covers_the_true_one() -> None:
    """The choice between Gram matrices and QR rests on it; the truth is measured in float64."""
    for condition in CONDITIONS:
        for m, r, n in [*SHAPES, (5000, 4, 3000)]:
            b, a = factors(m, r, n, condition)
            flat, quality = cpu.gram_svd([b], [a])
            t_b, t_a = flat[r:].view(2, r, r)
            u, v = b.double() @ t_b, a.double().mT @ t_a
            eye = torch.eye(r, dtype=torch.float64)
            true = max((x.mT @ x - eye).norm().nan_to_num(nan=math.inf) for x in (u, v))
            # It is a sum of likely sizes, not a bound; what it decides has a margin of RATIO.
            assert true <= 2 * float(quality[0, 0])


@needs_native
def test_a_qr_leaves_torch_s_threads_as_they_were_for_those_who_come_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    b, a, _ = degenerate()["B = 0"]
    factor, begun, seen = reference.factor, threading.Event(), []

    def slow(*args: Any) -> Factored:
        seen.append(torch.get_num_threads())
        begun.set()
        time.sleep(0.3)
        return factor(*args)

    def come_meanwhile() -> None:
        begun.wait()
        lowrank_svd([b], [a])  # takes a QR of its own, and puts back what it found
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(reference, "factor", slow)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        other = threading.Thread(target=come_meanwhile)
        other.start()
        lowrank_svd([b], [a])
        other.join()
        assert seen == [1, 1, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("n", [5000, 53248])
def test_the_estimated_loss_covers_rounding_that_goes_one_way(n: int) -> None:
    """Equal products round the same way each time: the sums' error then grows with their length, not its root."""
    generator = torch.Generator().manual_seed(0)
    r = 8
    a = torch.linspace(0.7, 1.3, r)[:, None].repeat(1, n)
    a[:, :r] += 100 * torch.randn(r, r, generator=generator)
    b = a.mT.contiguous()
    flat, quality = cpu.gram_svd([b], [a])
    for basis, t in zip((b.double(), a.double().mT), flat[r:].view(2, r, r), strict=True):
        u = basis @ t
        assert (u.mT @ u - torch.eye(r, dtype=torch.float64)).norm() <= 2 * float(quality[0, 0])


@needs_native
def test_the_loss_is_infinite_where_no_cholesky_factor_exists() -> None:
    b, a, _ = degenerate()["B = 0"]
    assert cpu.gram_svd([b], [a])[1][0, 0] == math.inf


@needs_native
def test_a_module_that_lost_too_much_takes_the_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_fast import _C

    solve = _C.lowrank_svd

    def second_is_lost(modules, out, quality, status, threads, vectors):  # type: ignore[no-untyped-def]
        solve(modules, out, quality, status, threads, vectors)
        quality[1, 0] = math.inf

    monkeypatch.setattr(_C, "lowrank_svd", second_is_lost)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    b, a = factors(60, 8, 75)
    good, bad = lowrank_svd([b, b], [a, a])
    assert good.basis_b.dtype == torch.float32
    assert bad.basis_b.dtype == torch.float64
    check_contract(b, a, bad)


def test_the_cpu_backend_refuses_factors_elsewhere_and_a_machine_without_the_native_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b, a = (x.to("meta") for x in factors(30, 4, 20))
    assert cpu.refuses([b], [a]) == "tensors are on meta"
    monkeypatch.setitem(sys.modules, "spectral_fast._C", None)
    assert "spectral_fast._C cannot be imported" in str(cpu.refuses())
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(
        RuntimeError, match=r"cpu refuses: the native module .*SPECTRAL_FAST_BACKEND=cpu allows no other"
    ):
        lowrank_svd(*([x] for x in factors(30, 4, 20)))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    lowrank_svd(*([x] for x in factors(30, 4, 20)))
    assert chosen_backends()["lowrank_svd"] == "reference"


@needs_native
def test_on_this_machine_the_cpu_backend_is_the_first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    lowrank_svd(*([x] for x in factors(30, 4, 20)))
    assert chosen_backends()["lowrank_svd"] == "cpu"
    assert [backend.name for backend in registered()["lowrank_svd"]] == ["cpu", "gpu", "reference"]


@needs_native
def test_the_reference_is_the_definition() -> None:
    """Against one dense SVD of b @ a, up to the signs of the pairs."""
    b, a = (x.double() for x in factors(30, 5, 40))
    f = reference.factor(b, a, "x")
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    signs = (f.basis_b @ f.t_b * u[:, :5]).sum(0).sign()
    assert torch.allclose(f.basis_b @ f.t_b * signs, u[:, :5], rtol=0, atol=1e-12)
    assert torch.allclose((f.t_a.mT @ f.basis_a) * signs[:, None], vh[:5], rtol=0, atol=1e-12)
    assert torch.allclose(f.s, s[:5], rtol=0, atol=1e-14)

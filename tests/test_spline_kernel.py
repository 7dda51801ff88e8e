"""The spline's op: each backend against its definition in float64, and the definition against finite differences."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends, native_missing
from spectral_fast.kernels import gpu
from spectral_fast.kernels.spline import SOFTNESS, spline, spline_reference

EPS = torch.finfo(torch.float32).eps
FORWARD = torch.ops.spectral_fast.spline_forward.default
BACKWARD = torch.ops.spectral_fast.spline_backward.default
WAYS = [
    {"method": method, "clamp": clamp, "extrapolate": extrapolate}
    for method, clamp, extrapolate in product(("piecewise", "soft"), (True, False), (True, False))
    if not (method == "soft" and extrapolate)
]
NAMES = ["-".join([way["method"], *(name for name in ("clamp", "extrapolate") if way[name])]) for way in WAYS]
DEVICE = "cpu" if gpu.INTERPRETED else "cuda"


@pytest.fixture(params=["cpu", "gpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend by force, so that a test of one cannot pass by way of another."""
    name: str = request.param
    if name == "cpu" and native_missing() and os.environ.get("CI") != "true":
        pytest.skip(str(native_missing()))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    if name == "gpu" and (reason := gpu.refuses()):
        pytest.skip(reason)
    return name


def device(backend: str) -> str:
    return DEVICE if backend == "gpu" else "cpu"


def learnt(knots: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values some way off the grid from -3 to 3."""
    generator = torch.Generator().manual_seed(knots)
    return torch.linspace(-3, 3, knots, dtype=dtype) + 0.2 * torch.randn(knots, generator=generator, dtype=dtype)


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor, **way: Any
) -> tuple[Tensor, ...]:
    """y, and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves, **way)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def check(n: int, knots: int, s_in: float, dtype: torch.dtype, where: str, **way: Any) -> None:
    """All that is computed against float64, within the roundoff of float32 on the way and that of the dtype."""
    generator = torch.Generator().manual_seed(n + knots)
    x, dy = (2.5 * torch.randn(n, generator=generator)).to(dtype), torch.randn(n, generator=generator).to(dtype)
    values, scales = learnt(knots), (torch.tensor([s_in]), torch.tensor([0.7]))
    dk = 6 / (knots - 1)
    u = (x.double() * scales[0].double() + 3) / dk
    # At a knot the slope is whichever of two: a rounding decides.
    keep = (u - u.round()).abs() > 1e-3
    x, dy = x[keep], dy[keep]
    mine = gradients(spline, tuple(t.to(where) for t in (x, values, *scales)), dy.to(where), **way)
    wide = tuple(t.double() for t in (x, values, *scales))
    true = gradients(spline_reference, wide, dy.double(), **way)
    assert [t.dtype for t in mine] == [dtype, dtype, torch.float32, torch.float32, torch.float32]

    inner = (wide[0].clamp(-3, 3) if way["clamp"] else wide[0]).abs()
    s = abs(s_in) * inner
    steepest, size = float(values.diff().abs().max()), float(values.abs().max())
    # u errs by a product, a constant and a sum; a weight by the steepness of its softmax times that, or by as much.
    error_u = 3 * EPS * (knots + s / dk)
    gain = 2 / SOFTNESS if way["method"] == "soft" else 1.0
    error_y = 0.7 * (gain * error_u * 4 * steepest + 6 * EPS * (size + steepest / dk * (3 + s)))
    error_slope = (gain**2 * error_u * 4 * steepest + 8 * EPS * steepest) / dk if gain > 1 else 8 * EPS * steepest / dk
    last = torch.finfo(dtype).eps
    sizes = dy.double().abs()
    bounds = (
        error_y + last * true[0].abs(),
        0.7 * abs(s_in) * error_slope * sizes + last * true[1].abs() + 1e-30,
        # Float32 sums of a block's lanes, in tens of terms.
        0.7 * (sizes * (gain * error_u + 40 * EPS)).sum(),
        0.7 * (sizes * inner * (error_slope + 40 * EPS * steepest / dk)).sum() + EPS * true[3].abs(),
        size * (sizes * (gain * error_u + 40 * EPS)).sum() * (1 + knots / 4),
    )
    for name, got, wanted, bound in zip(("y", "dx", "dv", "d_in", "d_out"), mine, true, bounds, strict=True):
        worst = ((got.cpu().double() - wanted).abs() - bound).max()
        assert worst <= 0, f"{name} errs by {float(worst):.2g} more than rounding explains"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_y_and_all_gradients_are_right_for_every_way_and_dtype(
    backend: str, way: dict[str, Any], dtype: torch.dtype
) -> None:
    for knots, s_in in product((2, 6), (1.0, 0.61, -1.3, 0.0)):
        check(2500, knots, s_in, dtype, device(backend), **way)
    assert {chosen_backends()[f"spline_{direction}"] for direction in ("forward", "backward")} == {backend}


@pytest.mark.parametrize("way", WAYS[::3], ids=NAMES[::3])
@pytest.mark.parametrize("knots", [3, 8, 12, 13, 16, 17, 28, 29, 33, 34, 70])
def test_any_number_of_knots_will_do(backend: str, knots: int, way: dict[str, Any]) -> None:
    check(1500, knots, 0.9, torch.float32, device(backend), **way)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 511, 512, 513, 2049, 32767, 33000])
def test_every_number_of_elements_is_right_at_the_edges_of_blocks(backend: str, n: int) -> None:
    x = torch.linspace(-4.3, 4.2, n).to(device(backend), torch.bfloat16).requires_grad_()
    v, s_in, s_out = (t.to(x.device).requires_grad_() for t in (learnt(5), torch.tensor([0.9]), torch.tensor([1.1])))
    y = spline(x, v, s_in, s_out)
    dx, dv, *_ = torch.autograd.grad(y, (x, v, s_in, s_out), torch.ones_like(y))
    wide = [t.detach().double().requires_grad_() for t in (x, v, s_in, s_out)]
    true = spline_reference(*wide)
    dx_true, dv_true, *_ = torch.autograd.grad(true, wide, torch.ones_like(true))
    assert y.shape == dx.shape == (n,)
    assert torch.allclose(y.double(), true, rtol=2**-8, atol=1e-6)
    assert torch.allclose(dx.double(), dx_true, rtol=2**-8, atol=0)
    # All is positive: each sum to the roundoff of its weights.
    assert torch.allclose(dv.double(), dv_true.double(), rtol=1e-5, atol=1e-5 * max(n, 1))


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("knots", [2, 3, 6])
def test_the_gradients_of_the_definition_are_those_of_finite_differences(way: dict[str, Any], knots: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 2.5 * torch.randn(40, generator=generator, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, learnt(knots, torch.float64), 1.2 * one, 0.7 * one)]
    assert torch.autograd.gradcheck(lambda *t: spline(*t, **way), inputs)
    assert torch.equal(spline(*inputs, **way), spline_reference(*inputs, **way))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_with_the_grid_for_values_it_is_the_identity_to_the_last_bit(backend: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10**e for e in (-6, -1, 0, 1)])
    x = x.to(device(backend), dtype)
    grid, one = torch.linspace(-3, 3, 5, device=x.device), torch.ones(1, device=x.device)
    assert torch.equal(spline(x, grid, one, one, clamp=False), x)
    assert torch.equal(spline(x, grid, one, one), x.clamp(-3, 3))


def test_beyond_the_clamp_x_has_no_gradient_but_scale_and_value_have(backend: str) -> None:
    x = torch.tensor([5.0, -7.0, 3.0], device=device(backend), requires_grad=True)
    v = torch.tensor([-3.0, -1.0, 2.0, 6.0], device=x.device, requires_grad=True)
    s_in, s_out = torch.ones(2, 1, device=x.device).unbind()
    parameters = [v, s_in.requires_grad_(), s_out.requires_grad_()]
    y = spline(x, *parameters)
    dx, dv, d_in, d_out = torch.autograd.grad(y.sum(), [x, *parameters])
    assert y.tolist() == [6, -3, 6]
    assert dx.tolist() == [0, 0, 2]  # the end of the grid still belongs to it
    assert dv.tolist() == [1, 0, 0, 2]
    assert d_in.tolist() == [2 * 3 + 1 * -3 + 2 * 3]  # a slope times what x is clamped to
    assert d_out.tolist() == [6 - 3 + 6]
    # Scaled out of the grid, the end values are constant.
    with torch.no_grad():
        s_in.fill_(1.5)
    dx, dv, d_in, _ = torch.autograd.grad(spline(x, *parameters).sum(), [x, *parameters])
    assert (dx.tolist(), dv.tolist(), d_in.tolist()) == ([0, 0, 0], [1, 0, 0, 2], [0])


def test_a_base_is_added_with_one_rounding_and_passes_the_gradient_on(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, base = torch.randn(2, 30, 70, generator=generator, device="cpu").to(device(backend)).unbind()
    v, one = learnt(5).to(x.device), torch.ones(1, device=x.device)
    for x_dtype, y_dtype in product((torch.float32, torch.bfloat16, torch.float16), repeat=2):
        z, b = x.to(x_dtype).requires_grad_(), base.to(y_dtype).requires_grad_()
        y = spline(z, v, one, one, base=b)
        true = spline_reference(z.double(), v.double(), one.double(), one.double()) + b.double()
        assert y.dtype == y_dtype
        last = torch.finfo(y_dtype).eps / 2
        # The reference rounds to the wider dtype of both and then to that of base.
        last *= 2 if backend == "reference" else 1
        assert ((y.double() - true).abs() <= last * true.abs() + 1e-5).all()
        dz, db = torch.autograd.grad(y, (z, b), torch.ones_like(y))
        assert (dz.dtype, db.dtype) == (x_dtype, y_dtype)
        assert torch.equal(db, torch.ones_like(b))


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := native_missing():
        pytest.skip(reason)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(2, 700_001, generator=generator).bfloat16()
    inputs = (x, learnt(5), torch.tensor([1.1]), torch.tensor([0.9]))
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([t for way in WAYS[::3] for t in gradients(spline, inputs, dy, **way)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_elements_of_one_sign_lose_little(backend: str) -> None:
    n = 300_000 if backend != "gpu" else 20_000
    x, dy = torch.full((n,), 0.3, device=device(backend)), torch.full((n,), 0.1, device=device(backend))
    one = torch.ones(1, device=x.device)
    _, dv, d_in, d_out = BACKWARD(
        dy, x, torch.linspace(-3, 3, 5, device=x.device), one, one, -3.0, 3.0, True, False, False
    )
    dy_wide, x_wide = float(dy[0].double()) * n, float(x[0].double())
    wanted = [0, 0, dy_wide * (1 - x_wide / 1.5), dy_wide * x_wide / 1.5, 0]
    # A block's lanes are added one by one, and its sum to others in float64.
    assert torch.allclose(dv.cpu().double(), torch.tensor(wanted, dtype=torch.float64), rtol=40 * EPS, atol=0)
    assert math.isclose(float(d_in), dy_wide * x_wide, rel_tol=40 * EPS)
    assert math.isclose(float(d_out), dy_wide * x_wide, rel_tol=80 * EPS)


@pytest.mark.parametrize("method", ["piecewise", "soft"])
def test_what_is_not_finite_stays_where_it_is(backend: str, method: str) -> None:
    x = torch.tensor([0.5, math.nan, math.inf, -math.inf, 1.0], device=device(backend))
    grid, one = torch.linspace(-3, 3, 5, device=x.device), torch.ones(1, device=x.device)
    y = spline(x, grid, one, one, method=method).cpu()
    assert torch.isnan(y).tolist() == [False, True, False, False, False]
    alone = spline(torch.tensor([3.0, -3.0], device=x.device), grid, one, one, method=method).cpu()
    assert torch.equal(y[2:4], alone)


def test_tensors_need_not_be_contiguous_nor_have_one_axis(backend: str) -> None:
    where = device(backend)
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(4)).to(where)
    v, one = learnt(10).to(where)[::2], torch.ones((), device=where)
    y = spline(x.permute(2, 0, 1), v, one, one)
    assert y.is_contiguous()
    assert torch.equal(y, spline(x, v.contiguous(), one, one).permute(2, 0, 1))
    assert spline(x[0, 0, 0], v, one, one).shape == ()
    dx, _, d_in, _ = BACKWARD(
        torch.ones(1, device=where).expand(4, 6, 5), x.permute(2, 0, 1), v, one, one, -3.0, 3.0, True, False, False
    )
    assert (dx.shape, d_in.shape) == ((4, 6, 5), ())


def test_a_layer_in_bfloat16_learns_its_spline_in_float32_under_autocast(backend: str) -> None:
    where = device(backend)
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(5)).to(where, torch.bfloat16).requires_grad_()
    v, s_in, s_out = (t.to(where).requires_grad_() for t in (learnt(5), torch.ones(1), torch.ones(1)))
    plain = spline(x, v, s_in, s_out)
    with torch.autocast(where, torch.bfloat16):
        y = spline(x, v, s_in, s_out)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plain)
    y.float().square().sum().backward()
    assert [t.grad.dtype for t in (x, v, s_in, s_out) if t.grad is not None] == [torch.bfloat16, *[torch.float32] * 3]


def test_autograd_keeps_x_and_the_parameters_alone() -> None:
    x = torch.randn(100, 50, requires_grad=True)
    v, s_in, s_out = (t.requires_grad_() for t in (learnt(5), torch.ones(1), torch.ones(1)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        spline(x, v, s_in, s_out)
    assert sum(t.nbytes for t in kept) == x.nbytes + (5 + 2) * 4


def test_the_ops_pass_opcheck(backend: str) -> None:
    where = device(backend)
    x, dy, base = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(6)).to(where).unbind()
    v, one = learnt(5).to(where), torch.ones(1, device=where)
    for soft, b in ((False, None), (True, base.bfloat16())):
        torch.library.opcheck(FORWARD, (x, v, one, one, -3.0, 3.0, True, False, soft, b))
        torch.library.opcheck(BACKWARD, (dy, x, v, one, one, -3.0, 3.0, True, False, soft))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_has_no_graph_break(backend: str) -> None:
    x, dy, base = torch.randn(3, 8, 9, generator=torch.Generator().manual_seed(7)).to(device(backend)).unbind()
    one = torch.ones(1, device=x.device)
    results = [
        gradients(function, (x, learnt(5).to(x.device), one, one), dy, method="soft", base=base)
        for function in (spline, torch.compile(spline, fullgraph=True, backend="aot_eager"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    x, v, one = torch.zeros(4), torch.zeros(5), torch.ones(1)
    with pytest.raises(ValueError, match=r"got \(5, 1\), \(1,\) and \(1,\)"):
        spline(x, v[:, None], one, one)
    with pytest.raises(ValueError, match=r"values \(K,\) with K of at least 2"):
        spline(x, v[:1], one, one)
    with pytest.raises(ValueError, match=r"got \(5,\), \(1,\) and \(2,\)"):
        spline(x, v, one, one.expand(2))
    with pytest.raises(ValueError, match="method must be piecewise or soft, got 'cubic'"):
        spline(x, v, one, one, method="cubic")
    for k_min, k_max in ((3.0, -3.0), (1.0, 1.0), (-math.inf, 0.0), (math.nan, 0.0)):
        with pytest.raises(ValueError, match=r"from a finite k_min up to a finite k_max, got "):
            spline(x, v, one, one, k_min, k_max)
    with pytest.raises(ValueError, match="extrapolate is of a piecewise one"):
        spline(x, v, one, one, extrapolate=True, method="soft")
    with pytest.raises(ValueError, match=r"base must have the shape of x, \(4,\), got \(3,\)"):
        spline(x, v, one, one, base=x[:3])
    with pytest.raises(TypeError, match=r"got torch.int64, torch.float32"):
        spline(x.long(), v, one, one)
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        spline(x, v.to("meta"), one, one)

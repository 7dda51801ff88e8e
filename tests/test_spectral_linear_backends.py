"""Each backend of the two ops against float64, at and around the edges of blocks, parts and segments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends
from spectral_fast.kernels import gpu
from spectral_fast.kernels.spectral_linear import spectral_linear

FORWARD = torch.ops.spectral_fast.spectral_linear_forward.default
BACKWARD = torch.ops.spectral_fast.spectral_linear_backward.default
EPS = torch.finfo(torch.float32).eps
SCALING = -0.75
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [  # tokens, m, n, r
    (0, 40, 24, 3),
    (1, 1, 1, 1),
    (2, 1, 700, 2),
    (5, 100, 600, 3),
    (31, 65, 63, 15),
    (63, 64, 32, 16),
    (64, 63, 65, 17),
    (65, 257, 130, 33),
    (130, 48, 96, 64),
    (33, 31, 33, 65),
    (17, 129, 40, 129),
    (3, 30, 50, 256),
]
LAYOUTS = {
    "one": [0, 130],
    "samples": [0, 1, 64, 65, 129, 130],
    "many": list(range(131)),
    "empty ones": [0, 0, 0, 50, 50, 130, 130],
}


@pytest.fixture(params=["gpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each backend by force, with what it allocates full of NaN."""
    name: str = request.param
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    if name == "gpu" and (reason := gpu.refuses()):
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True)
    yield name
    torch.use_deterministic_algorithms(False)


def operands(tokens: int, m: int, n: int, r: int, dtype: torch.dtype, segments: int = 1) -> list[Tensor]:
    """x, y, dy, u, vh in a dtype, and s."""
    generator = torch.Generator().manual_seed(tokens + 7 * m + 31 * n + r)
    shapes = ((tokens, n), (tokens, m), (tokens, m), (m, r), (r, n))
    device = "cpu" if gpu.INTERPRETED else "cuda"
    made = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]
    return [*made, torch.rand(segments, r, generator=generator).to(device)]


def check(tokens: int, m: int, n: int, r: int, dtype: torch.dtype, starts: list[int] | None = None) -> None:
    """Both ops within the roundoff of their sums of products: eps is twice the unit roundoff, and so has room."""
    segments = 1 if starts is None else len(starts) - 1
    x, y, dy, u, vh, s = operands(tokens, m, n, r, dtype, segments)
    bounds = None if starts is None else torch.tensor(starts)
    own = s[0] if starts is None else s
    out, p = FORWARD(x, y, u, own, vh, SCALING, bounds)
    dx, g = BACKWARD(dy, p, u, own, vh, SCALING, bounds, True)
    assert (out.dtype, p.dtype, dx.dtype, g.dtype) == (dtype, dtype, dtype, torch.float32)
    assert g.shape == own.shape

    eps = torch.finfo(dtype).eps
    edges = [0, tokens] if starts is None else starts
    scales = SCALING * s.double().repeat_interleave(torch.tensor(edges).diff().to(s.device), 0)
    x, y, dy, u, vh, kept = (t.double() for t in (x, y, dy, u, vh, p))
    p_wide, p_abs = x @ vh.mT, x.abs() @ vh.mT.abs()
    assert ((p.double() - p_wide).abs() <= (n * EPS + eps) * p_abs).all()
    # The projection, its scale and their product are rounded to the dtype at most, the sums to float32.
    wanted = y + (p_wide * scales) @ u.mT
    error = (4 * eps + (n + r + 4) * EPS) * ((p_abs * scales.abs()) @ u.mT.abs()) + eps * wanted.abs()
    assert ((out.double() - wanted).abs() <= error).all()
    q_wide, q_abs = dy @ u, dy.abs() @ u.abs()
    wanted = (q_wide * scales) @ vh
    error = (4 * eps + (m + r + 4) * EPS) * ((q_abs * scales.abs()) @ vh.abs()) + eps * wanted.abs()
    assert ((dx.double() - wanted).abs() <= error).all()
    for t, (begin, end) in enumerate(itertools.pairwise(edges)):
        wanted = SCALING * (kept[begin:end] * q_wide[begin:end]).sum(0)
        error = abs(SCALING) * (kept[begin:end].abs() * q_abs[begin:end]).sum(0)
        error *= eps + (m + end - begin + 4) * EPS
        assert ((g.view(segments, r)[t].double() - wanted).abs() <= error).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "m", "n", "r"), SHAPES)
def test_both_directions_are_right_at_every_edge(
    backend: str, tokens: int, m: int, n: int, r: int, dtype: torch.dtype
) -> None:
    check(tokens, m, n, r, dtype)
    assert {chosen_backends()[f"spectral_linear_{way}"] for way in ("forward", "backward")} == {backend}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_segment_has_its_own_singular_values_and_sensitivity(layout: str) -> None:
    check(130, 70, 100, 5, torch.float32, LAYOUTS[layout])


@pytest.mark.usefixtures("backend")
def test_dx_is_formed_only_where_it_is_wanted() -> None:
    x, y, dy, u, vh, s = operands(70, 33, 40, 6, torch.float32)
    _, p = FORWARD(x, y, u, s[0], vh, SCALING, None)
    _, g = BACKWARD(dy, p, u, s[0], vh, SCALING, None, True)
    none, alone = BACKWARD(dy, p, u, s[0], vh, SCALING, None, False)
    assert none.shape == (0, 40)
    assert torch.equal(g, alone)


@pytest.mark.usefixtures("backend")
def test_the_bits_are_the_same_in_every_run_and_a_segment_does_not_see_the_others() -> None:
    x, y, dy, u, vh, s = operands(200, 30, 64, 8, torch.bfloat16)
    p = FORWARD(x, y, u, s[0], vh, SCALING, None)[1]
    starts = torch.tensor([0, 37, 150, 200])
    dx, g = BACKWARD(dy, p, u, s.expand(3, -1), vh, SCALING, starts, True)
    again = BACKWARD(dy, p, u, s.expand(3, -1), vh, SCALING, starts, True)
    assert torch.equal(dx, again[0])
    assert torch.equal(g, again[1])
    apart = BACKWARD(dy[37:150], p[37:150], u, s[0], vh, SCALING, None, True)
    torch.testing.assert_close(apart[1], g[1], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_operands_need_not_be_contiguous() -> None:
    x, y, dy, u, vh, s = operands(70, 33, 40, 6, torch.float32)
    out, p = FORWARD(x, y, u, s[0], vh, SCALING, None)
    dx, g = BACKWARD(dy, p, u, s[0], vh, SCALING, None, True)
    x, y, dy, u, vh, p_other = (t.mT.contiguous().mT for t in (x, y, dy, u, vh, p))
    for got, wanted in zip(FORWARD(x, y, u, s[0], vh, SCALING, None), (out, p), strict=True):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip(BACKWARD(dy, p_other, u, s[0], vh, SCALING, None, True), (dx, g), strict=True):
        torch.testing.assert_close(got, wanted)


def test_few_tokens_are_cut_into_parts_and_the_parts_cost_little() -> None:
    from spectral_fast.kernels.spectral_linear.gpu import parts

    assert parts(64, 4096, 4096, 16, 2) > 8
    assert parts(65536, 4096, 4096, 16, 2) == 1
    assert parts(64, 128, 4096, 16, 2) == 1
    assert parts(0, 128, 64, 16, 2) == 1
    for tokens in (1, 100, 1000, 10_000):
        for r in (8, 64, 256):
            number = parts(tokens, 4096, 1024, r, 2)
            least = 2 * (tokens + r) * 5120
            assert number == 1 or 8 * number * tokens * r <= least / 12


def test_the_gradient_of_singular_values_per_sample_is_the_sensitivity_of_each() -> None:
    x, y, dy, u, vh, s = (t.double() for t in operands(12, 5, 7, 3, torch.float32))
    s = s[0].requires_grad_()
    starts = torch.tensor([0, 5, 5, 12])
    own = s.expand(3, -1)
    own.retain_grad()
    spectral_linear(x.view(3, 4, 7), y.view(3, 4, 5), u, own, vh, 2.0, starts).backward(dy.view(3, 4, 5))
    assert own.grad is not None
    for t, (begin, end) in enumerate([(0, 5), (5, 5), (5, 12)]):
        alone = s.detach().clone().requires_grad_()
        spectral_linear(x[begin:end], y[begin:end], u, alone, vh, 2.0).backward(dy[begin:end])
        torch.testing.assert_close(own.grad[t], alone.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(s.grad, own.grad.sum(0))


def test_starts_that_do_not_fit_are_refused() -> None:
    x, y, _, u, vh, s = operands(4, 5, 6, 2, torch.float32)
    with pytest.raises(ValueError, match=r"s \(segments, r\).* s \(1, 2\).* and 2 segments"):
        spectral_linear(x, y, u, s, vh, 1.0, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="starts must go from 0 to 4"):
        spectral_linear(x, y, u, s, vh, 1.0, torch.tensor([0, 3]))


def test_what_triton_cannot_take_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpu")
    for dtype, r, reason in ((torch.float64, 2, "x is float64"), (torch.float32, 257, "rank 257 is above 256")):
        x, y, _, u, vh, s = operands(3, 4, 5, r, dtype)
        with pytest.raises(RuntimeError, match=reason):
            spectral_linear(x, y, u, s[0], vh, 1.0)
    x, y, _, u, vh, s = operands(3, 4, 5, 2, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"one dtype is wanted, and there are torch\.bfloat16, torch\.float32"):
        spectral_linear(x, y.float(), u, s[0], vh, 1.0)


def test_the_interpreter_is_taken_only_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    if not gpu.INTERPRETED:
        pytest.skip("there is a GPU")
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    x, y, _, u, vh, s = operands(3, 4, 5, 2, torch.float32)
    spectral_linear(x, y, u, s[0], vh, 1.0)
    assert chosen_backends()["spectral_linear_forward"] == "reference"


@pytest.mark.usefixtures("backend")
def test_the_ops_pass_opcheck() -> None:
    x, y, dy, u, vh, s = operands(10, 6, 7, 3, torch.float32)
    p, starts = x @ vh.mT, torch.tensor([0, 4, 10])
    for own, bounds in ((s[0], None), (s.repeat(2, 1), starts)):
        torch.library.opcheck(FORWARD, (x, y, u, own, vh, 0.5, bounds))
        for wanted in (True, False):
            torch.library.opcheck(BACKWARD, (dy, p, u, own, vh, 0.5, bounds, wanted))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("backend")
def test_compile_has_no_graph_break() -> None:
    x, y, dy, u, vh, s = operands(8, 6, 7, 3, torch.float32)
    results = []
    for function in (spectral_linear, torch.compile(spectral_linear, fullgraph=True, backend="aot_eager")):
        inputs = [t.detach().clone().requires_grad_() for t in (x, y, s[0])]
        out = function(inputs[0], inputs[1], u, inputs[2], vh, 0.5)
        results.append([out, *torch.autograd.grad(out, inputs, dy)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)

"""The spectral LoRA branch against its definition, forward and backward."""

from __future__ import annotations

import pytest
import torch

from spectral_fast.kernels.spectral_linear import spectral_linear, spectral_linear_reference

SHAPES = [((5,), 7, 9, 3), ((2, 4), 6, 5, 1), ((1, 1), 4, 4, 4), ((0,), 3, 2, 2), ((3,), 2, 3, 5)]


def operands(lead: tuple[int, ...], m: int, n: int, r: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 100 + n)
    x, y, u, s, vh = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((*lead, n), (*lead, m), (m, r), (r,), (r, n))
    )
    return [x.requires_grad_(), y.requires_grad_(), u, s.requires_grad_(), vh]


@pytest.mark.parametrize(("lead", "m", "n", "r"), SHAPES)
def test_forward_and_all_gradients_are_those_of_the_definition(lead: tuple[int, ...], m: int, n: int, r: int) -> None:
    results = []
    for function in (spectral_linear, spectral_linear_reference):
        x, y, u, s, vh = operands(lead, m, n, r)
        out = function(x, y, u, s, vh, 1.7)
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), (x, y, s))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_gradcheck() -> None:
    x, y, u, s, vh = operands((2, 3), 4, 5, 3)
    assert torch.autograd.gradcheck(lambda x, y, s: spectral_linear(x, y, u, s, vh, 0.7), (x, y, s))


def test_no_gradient_of_x_is_formed_where_x_needs_none() -> None:
    x, y, u, s, vh = operands((4,), 5, 6, 2)
    out = spectral_linear(x.detach(), y.detach(), u, s, vh, 1.0)
    out.sum().backward()
    assert x.grad is None
    assert y.grad is None
    assert s.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_over_tokens_in_float32(dtype: torch.dtype) -> None:
    """4096 equal terms: a half-precision sum would stop growing at 256 (bf16) or 2048 (fp16)."""
    tokens = 4096
    x, y = torch.ones(tokens, 1, dtype=dtype), torch.zeros(tokens, 1, dtype=dtype)
    s = torch.ones(1, requires_grad=True)
    one = torch.ones(1, 1, dtype=dtype)
    spectral_linear(x, y, one, s, one, 1.0).sum().backward()
    assert s.grad is not None
    assert s.grad.item() == tokens


def test_non_contiguous_input_and_gradient() -> None:
    x, y, u, s, vh = operands((3, 4), 5, 6, 2)
    strided = x.detach().mT.contiguous().mT.requires_grad_()
    got = spectral_linear(strided, y, u, s, vh, 1.0)
    torch.testing.assert_close(got, spectral_linear_reference(x, y, u, s, vh, 1.0))
    upstream = torch.randn(4, 3, 5, dtype=torch.float64).transpose(0, 1)
    [g] = torch.autograd.grad(got, s, upstream)
    [wanted] = torch.autograd.grad(spectral_linear_reference(x, y, u, s, vh, 1.0), s, upstream)
    torch.testing.assert_close(g, wanted)


def test_shapes_that_do_not_fit_are_named() -> None:
    x, y, u, _, vh = operands((3,), 5, 6, 2)
    with pytest.raises(ValueError, match=r"got x \(3, 6\), y \(3, 5\), u \(5, 2\), s \(3,\)"):
        spectral_linear(x, y, u, torch.ones(3), vh, 1.0)


def test_what_does_not_fit_together_is_refused_in_words() -> None:
    x, y, u, s, vh = (t.detach() for t in operands((4,), 5, 6, 2))
    for wrong in ((x, y, u[:, 0], s, vh), (x, y, u[None], s, vh), (x, y, u, s, vh[0]), (x, y, u, s[:1], vh)):
        with pytest.raises(ValueError, match="spectral_linear wants x"):
            spectral_linear(*wrong, 1.0)
    for wrong in ((x, y, u.float(), s, vh), (x, y, u, s.bfloat16(), vh), (x.long(), y, u.long(), s, vh.long())):
        with pytest.raises(TypeError, match="must share one of"):
            spectral_linear(*wrong, 1.0)
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        spectral_linear(x, y, u, s.to("meta"), vh, 1.0)


def test_autocast_changes_nothing() -> None:
    results = []
    for enabled in (False, True):
        x, y, u, s, vh = operands((4,), 5, 6, 2, torch.float32)
        s = s.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = spectral_linear(x, y, u, s, vh, 1.5)
        results.append((out, *torch.autograd.grad(out.sum(), (x, s))))
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)

"""Sums of products of many modules at once: each backend against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends
from spectral_fast.kernels import gpu
from spectral_fast.kernels.sensitivity import Module, grouped_products, grouped_reference

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(24, 40, 3), (1, 1, 1), (33, 7, 16), (64, 65, 17), (130, 64, 70), (8, 8, 9), (20, 16, 129), (5, 6, 256)]
DEVICE = "cpu" if gpu.INTERPRETED else "cuda"


@pytest.fixture(params=["gpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend by force."""
    name: str = request.param
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    if name == "gpu" and (reason := gpu.refuses()):
        pytest.skip(reason)
    return name


def module(tokens: int, m: int, n: int, r: int, dtype: torch.dtype, factors: torch.dtype | None = None) -> Module:
    generator = torch.Generator().manual_seed(m + 5 * n + 17 * r)
    shapes = ((tokens, n), (tokens, m), (m, r), (r, n))
    made = [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]
    kinds = (dtype, dtype, factors or dtype, factors or dtype)
    return Module(*(t.to(kind) for t, kind in zip(made, kinds, strict=True)))


def check(modules: list[Module], starts: list[int] | None = None) -> None:
    """Within the roundoff of two sums of products, their product and its sum."""
    edges = [0, len(modules[0].x)] if starts is None else starts
    got = grouped_products(modules, None if starts is None else torch.tensor(starts))
    assert len(got) == len(modules)
    for sums, (x, dy, u, vh) in zip(got, modules, strict=True):
        assert (sums.dtype, sums.shape) == (torch.float32, (len(edges) - 1, u.shape[1]))
        x, dy, u, vh = (t.double() for t in (x, dy, u, vh))
        terms, sizes = (x @ vh.mT) * (dy @ u), (x.abs() @ vh.mT.abs()) * (dy.abs() @ u.abs())
        for t, (begin, end) in enumerate(itertools.pairwise(edges)):
            bound = (len(vh.mT) + len(u) + end - begin + 2) * EPS * sizes[begin:end].sum(0)
            assert ((sums[t].double() - terms[begin:end].sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_modules_of_all_shapes_go_together(backend: str, tokens: int, dtype: torch.dtype) -> None:
    check([module(tokens, *shape, dtype) for shape in SHAPES])
    assert chosen_backends()["grouped_products"] == backend


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("starts", [[0, 1, 64, 65, 130], [0, 0, 50, 50, 130, 130], [0, 130]], ids=str)
def test_every_segment_has_its_own_sums(starts: list[int]) -> None:
    check([module(130, *shape, torch.float16) for shape in SHAPES[:4]], starts)


@pytest.mark.usefixtures("backend")
def test_modules_may_differ_in_dtype() -> None:
    check([module(9, *SHAPES[i], dtype) for i, dtype in enumerate(DTYPES * 2)])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_in_float32_are_taken_as_they_are(dtype: torch.dtype) -> None:
    check([module(40, r, r, r, dtype, torch.float32) for r in (1, 8, 20, 64, 100)])


@pytest.mark.usefixtures("backend")
def test_a_lora_basis_gives_the_sums_of_the_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((50, 40), (50, 30), (6, 40), (30, 6))
    x, dy, a, b = (torch.randn(*shape, generator=generator).double() for shape in shapes)
    r_b, r_a = (torch.linalg.qr(t, mode="r")[1] for t in (b, a.mT))
    w, _, zh = torch.linalg.svd(r_b @ r_a.mT)
    t_b, t_a = torch.linalg.solve(r_b, w), torch.linalg.solve(r_a, zh.mT).contiguous()
    [wanted] = grouped_reference([Module(x, dy, b @ t_b, t_a.mT @ a)], torch.tensor([0, 50]))
    inside = Module(*(t.float().to(DEVICE) for t in (x @ a.mT, dy @ b, t_b, t_a.mT)))
    check([inside])
    # Each of the four is rounded to float32 at first, and everything else is as above.
    ax, bdy, t_b, t_ah = (t.double().abs() for t in inside)
    bound = (4 + 2 * 6 + 50 + 2) * EPS * ((ax @ t_ah.mT) * (bdy @ t_b)).sum(0)
    assert ((grouped_products([inside])[0].double() - wanted.to(DEVICE)).abs() <= bound).all()


@pytest.mark.usefixtures("backend")
def test_rows_may_lie_anywhere() -> None:
    whole = module(70, 48, 80, 16, torch.bfloat16)
    slices = Module(whole.x[:, 3:40], whole.dy[:, 8:40], whole.u[8:40], whole.vh[:, 3:40])
    turned = Module(*(t.mT.contiguous().mT for t in whole))
    wide = Module(*(torch.nn.functional.pad(t, (8, 8))[:, 8:-8] for t in whole))
    check([whole, slices, turned, wide])


@pytest.mark.usefixtures("backend")
def test_the_bits_do_not_depend_on_the_other_modules_nor_segments() -> None:
    modules = [module(150, m, n, 10, torch.bfloat16) for m, n in ((24, 40), (64, 64))]
    starts = torch.tensor([0, 20, 150])
    together = grouped_products(modules, starts)
    for one, alone in zip(together, modules, strict=True):
        assert torch.equal(one, grouped_products([alone], starts)[0])
        assert torch.equal(one[1:], grouped_products([Module(alone.x[20:], alone.dy[20:], *alone[2:])])[0])


def test_float64_gives_float64_sums() -> None:
    [sums] = grouped_products([module(5, 4, 6, 2, torch.float64)])
    assert sums.dtype == torch.float64
    assert grouped_products([]) == []


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = module(6, 4, 5, 2, torch.float32)

    def replaced(**tensors: Tensor) -> list[Module]:
        return [good, good._replace(**tensors)]

    with pytest.raises(ValueError, match=r"wants x \(6, n\).*; got for module 1 x \(5, 5\), dy \(6, 4\)"):
        grouped_products(replaced(x=good.x[1:]))
    with pytest.raises(ValueError, match=r"got for module 1 .* u \(4, 2\), vh \(1, 5\)"):
        grouped_products(replaced(vh=good.vh[1:]))
    with pytest.raises(TypeError, match=r"got for module 1 x torch\.float32, dy torch\.float16"):
        grouped_products(replaced(dy=good.dy.half()))
    with pytest.raises(TypeError, match=r"u torch\.bfloat16, vh torch\.bfloat16"):
        grouped_products(replaced(u=good.u.bfloat16(), vh=good.vh.bfloat16()))
    with pytest.raises(ValueError, match="starts must go from 0 to 6"):
        grouped_products([good], torch.tensor([0, 5]))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpu")
    wide = good._replace(u=good.u.double(), vh=good.vh.double())
    for other, reason in ((module(6, 4, 5, 257, torch.float32), "rank 257"), (wide, "float64")):
        with pytest.raises(RuntimeError, match=reason):
            grouped_products([good, other])

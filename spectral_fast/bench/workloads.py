"""What is run: each kernel on the shapes of real adapters, with what people use today, its check and its floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_fast.bench import gate, least, peers
from spectral_fast.bench.factors import Factors, adapter_factors, conditioned, splines, with_outputs
from spectral_fast.bench.least import Shape, Work
from spectral_fast.kernels.batched_svd import batched_svd
from spectral_fast.kernels.lowrank_svd import Factored, reference
from spectral_fast.kernels.sensitivity import Module, grouped_products, segment_products
from spectral_fast.kernels.spectral_linear import spectral_linear, spectral_linear_reference
from spectral_fast.kernels.spline import spline
from spectral_fast.spectrum import Spectrum, lowrank_svd, rebuild

OURS = "spectral_fast"
SCALING = 2.0
Title = tuple[str, str]  # the kernel that is measured, and the workload, in words
Titles = tuple[Title, ...]


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are.

    Attributes:
        models: name -> (out features m, in features n) of every linear layer of one block, the last one being the
            largest, and the number of blocks.
        ranks: of the adapters.
        samples: of the calibration, 32 in the published method.
        tokens: per sample.
        cores: (number of matrices, r) of the batches of SVDs.
    """

    models: Mapping[str, tuple[tuple[Shape, ...], int]]
    ranks: tuple[int, ...]
    samples: int
    tokens: int
    cores: tuple[tuple[int, int], ...]


def llama(blocks: int, hidden: int, key_value: int, mlp: int) -> tuple[tuple[Shape, ...], int]:
    """Shapes of q, k, v, o, gate, up and down, and the number of blocks."""
    wide = (hidden, hidden)
    return (wide, (key_value, hidden), (key_value, hidden), wide, (mlp, hidden), (mlp, hidden), (hidden, mlp)), blocks


FULL = Sizes(
    {"Llama-2-7B": llama(32, 4096, 4096, 11008), "Llama-3-70B": llama(80, 8192, 1024, 28672)},
    ranks=(16, 64),
    samples=32,
    tokens=200,
    cores=((560, 16), (560, 64), (160, 128)),
)
# The same code on sizes that the interpreter gets through; the samples end inside of blocks.
TINY = Sizes({"tiny": llama(1, 48, 16, 80)}, ranks=(8,), samples=3, tokens=23, cores=((2, 16),))


@dataclass(frozen=True)
class Case:
    """A workload.

    Attributes:
        kernel: what is measured.
        name: the workload, in words.
        ops: the registered ops that it consists of.
        runs: implementation -> call, ours first.
        check: (implementation, what its call returned) -> raises ``gate.WrongResult`` if that is wrong.
        least: what cannot be avoided.
    """

    kernel: str
    name: str
    ops: tuple[str, ...]
    runs: Mapping[str, Callable[[], Any]]
    check: Callable[[str, Any], None]
    least: Work


class Group(NamedTuple):
    """Workloads that share tensors.

    Attributes:
        titles: (kernel, name) of each workload.
        make: makes the tensors and then the workloads in turn.
    """

    titles: Titles
    make: Callable[[], Iterator[Case]]


def groups(sizes: Sizes, device: torch.device) -> Iterator[Group]:
    """All workloads, none of them made yet."""
    tokens = sizes.samples * sizes.tokens

    def group(make: Callable[..., Iterator[Case]], titles: Titles, *args: Any) -> Group:
        return Group(titles, partial(make, titles, *args, device))

    for model, (shapes, blocks) in sizes.models.items():
        for rank in sizes.ranks:
            name = f"{model} down, r = {rank}, {tokens} tokens"
            kernels = "spectral_linear, forward", "spectral_linear, forward and backward with g"
            yield group(_branch, tuple((kernel, name) for kernel in kernels), tokens, shapes[-1], rank)
            titles = (
                ("sensitivity", f"r = {rank}, {tokens} tokens"),
                ("sensitivity, grouped", f"{model}, r = {rank}, {len(shapes)} modules, {tokens} tokens"),
            )
            yield group(_sensitivity, titles, sizes, shapes, rank)
            name = f"{model}, {len(shapes) * blocks} modules, r = {rank}"
            yield group(_adapter, (("lowrank_svd", name), ("recompose", name)), shapes * blocks, rank)
        name = f"{model} up, {tokens} tokens, 5 knots"
        yield group(_spline, (("spline, forward and backward", name),), tokens, shapes[-2][0])
    for count, rank in sizes.cores:
        yield group(_cores, (("batched_svd", f"{count} matrices {rank} × {rank}, float32"),), count, rank)


def _spectral(shape: Shape, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), s (r,) and Vᵀ (r, n) in the dtypes that calibration keeps them in."""
    u, v = (torch.linalg.qr(torch.randn(length, rank, device=device))[0] for length in shape)
    return u.bfloat16(), torch.logspace(0, -2, rank, device=device), v.mT.contiguous().bfloat16()


def _branch(titles: Titles, tokens: int, shape: Shape, rank: int, device: torch.device) -> Iterator[Case]:
    forward, both = titles
    m, n = shape
    x, y, dy = (torch.randn(tokens, width, device=device).bfloat16() for width in (n, m, m))
    u, s, vh = _spectral(shape, rank, device)
    with torch.no_grad():
        truth = gate.branch_in_float64(x, y, dy, u, s, vh, SCALING)
    branch = x, y, u, s, vh, SCALING
    there = least.forward(shape, tokens, rank, x.element_size())
    back = least.backward(shape, tokens, rank, x.element_size())
    yield Case(
        *forward,
        ("spectral_linear_forward",),
        {
            OURS: partial(peers.forward_only, spectral_linear, *branch),
            "torch": partial(peers.forward_only, spectral_linear_reference, *branch),
        },
        partial(gate.check_terms, truth),
        there,
    )
    yield Case(
        *both,
        ("spectral_linear_forward", "spectral_linear_backward"),
        {
            OURS: partial(peers.forward_and_backward, spectral_linear, *branch, dy),
            "torch autograd": partial(peers.forward_and_backward, spectral_linear_reference, *branch, dy),
            "torch hooks": partial(peers.by_hooks, *branch, dy),
        },
        partial(gate.check_terms, truth),
        Work(there.nbytes + back.nbytes, {unit: there.flops[unit] + back.flops[unit] for unit in there.flops}),
    )


def _spline(titles: Titles, tokens: int, width: int, device: torch.device) -> Iterator[Case]:
    x, dy, *parameters = splines(tokens, width, 5, torch.bfloat16, device)
    there, back = least.spline(x.numel(), x.element_size(), False), least.spline_backward(x.numel(), x.element_size())
    yield Case(
        *titles[0],
        ("spline_forward", "spline_backward"),
        {
            OURS: partial(peers.splined, spline, x, dy, *parameters),
            "torch autograd": partial(peers.splined, peers.piecewise_spline, x, dy, *parameters),
        },
        partial(gate.check_terms, gate.splined_in_float64(x, dy, *parameters)),
        Work(there.nbytes + back.nbytes, {unit: there.flops[unit] + back.flops[unit] for unit in there.flops}),
    )


def _sensitivity(
    titles: Titles, sizes: Sizes, shapes: tuple[Shape, ...], rank: int, device: torch.device
) -> Iterator[Case]:
    one, grouped = titles
    tokens = sizes.samples * sizes.tokens
    starts = torch.arange(0, tokens + 1, sizes.tokens)
    p, q = torch.randn(2, tokens, rank, device=device).bfloat16()
    yield Case(
        *one,
        ("sensitivity",),
        {OURS: partial(segment_products, p, q, starts), "torch": partial(peers.products_per_sample, p, q, starts)},
        lambda who, g: gate.check_sensitivity(who, [(p, q)], starts, [g]),
        least.products(tokens, sizes.samples, rank, p.element_size()),
    )
    modules = []
    for m, n in shapes:
        u, _, vh = _spectral((m, n), rank, device)
        x, dy = (torch.randn(tokens, width, device=device).bfloat16() for width in (n, m))
        modules.append(Module(x, dy, u, vh))
    yield Case(
        *grouped,
        ("grouped_products",),
        {OURS: partial(grouped_products, modules, starts), "torch hooks": partial(peers.hooked, modules, starts)},
        partial(gate.check_grouped, modules, starts),
        least.grouped(shapes, tokens, sizes.samples, rank, p.element_size()),
    )


def _adapter(titles: Titles, shapes: tuple[Shape, ...], rank: int, device: torch.device) -> Iterator[Case]:
    svd, recompose = titles
    kappas = [10 ** (1 + 3 * i / max(1, len(shapes) - 1)) for i in range(len(shapes))]
    bs, as_ = ([x.to(device) for x in side] for side in adapter_factors(shapes, rank, torch.bfloat16, kappas))
    factors = with_outputs(bs, as_)
    true_s = [reference.factor(b, a, "a module").s for b, a in zip(bs, as_, strict=True)]
    factors = replace(factors, s_new=[gate.amplified(s) for s in true_s])

    def check_spectra(who: str, found: Any) -> None:
        if who == OURS:
            # Whatever goes wrong on the way ends in a QR of that module, which none of these needs.
            redone = sum(x.factored.basis_b.data_ptr() != b.data_ptr() for x, b in zip(found, bs, strict=True))
            if redone:
                raise gate.WrongResult(f"{redone} of {len(bs)} modules were done again by QR")
            rebuild(found, factors.s_new, factors.outs)
        else:
            peers.write(found, factors)
        gate.check_rebuilt(who, factors, true_s, [x.s if who == OURS else x[1] for x in found])

    yield Case(
        *svd,
        ("lowrank_svd",),
        {OURS: partial(lowrank_svd, bs, as_)}
        | {
            f"torch.linalg.qr batched, svd {driver or 'default'}": partial(peers.qr_and_svd, bs, as_, driver)
            for driver in peers.drivers(device)
        },
        check_spectra,
        least.spectra(shapes, rank, bs[0].element_size()),
    )
    # Not by our SVD: if that is broken here, this must be measured all the same.
    spectra = [_spectrum(b, a) for b, a in zip(bs, as_, strict=True)]
    yield Case(
        *recompose,
        ("recompose",),
        {
            OURS: partial(_rebuild, spectra, factors),
            "torch, a product each": partial(peers.products, spectra, factors),
        },
        lambda who, _: gate.check_rebuilt(who, factors, true_s, [x.s for x in spectra]),
        least.recomposed(shapes, rank, bs[0].element_size()),
    )


def _spectrum(b: Tensor, a: Tensor) -> Spectrum:
    """U = B T_B and V = Aᵀ T_A with the transforms of the definition: T_B = R_B⁻¹ W, T_A = R_A⁻¹ Z."""
    x = reference.factor(b, a, "a module")
    t_b = torch.linalg.solve(x.basis_b.mT @ b.double(), x.t_b)
    t_a = torch.linalg.solve(x.basis_a @ a.double().mT, x.t_a)
    sizes = (b.double().norm(dim=0)[:, None] * t_b, a.double().norm(dim=1)[:, None] * t_a)
    amplification = max(float(size.norm(dim=0).amax()) for size in sizes)
    return Spectrum(Factored(b, t_b, x.s, t_a, a, amplification), (b.dtype, a.dtype))


def _rebuild(spectra: Any, factors: Factors) -> None:
    rebuild(spectra, factors.s_new, factors.outs)


def _cores(titles: Titles, count: int, rank: int, device: torch.device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    kappas = [10 ** (1 + 3 * i / max(1, count - 1)) for i in range(count)]
    x = torch.cat([conditioned(1, rank, kappa, generator) for kappa in kappas]).float().to(device)
    yield Case(
        *titles[0],
        ("batched_svd",),
        {OURS: partial(batched_svd, x)}
        | {
            f"torch.linalg.svd {driver or 'default'}": partial(peers.svd, x, driver) for driver in peers.drivers(device)
        },
        lambda who, usv: gate.check_svd(who, x, usv),
        least.svds(count, rank, x.element_size()),
    )

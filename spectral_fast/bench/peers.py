"""What people run today on a GPU, in torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectral_fast.bench.factors import Factors
from spectral_fast.kernels.sensitivity import Module

Usv = tuple[Tensor, Tensor, Tensor]


def drivers(device: torch.device) -> tuple[str | None, ...]:
    """CuSOLVER's methods that torch.linalg.svd offers; elsewhere there is no choice."""
    return ("gesvd", "gesvdj", "gesvda") if device.type == "cuda" and not torch.version.hip else (None,)


def svd(x: Tensor, driver: str | None) -> Usv:
    """Torch's batched SVD."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False, driver=driver)
    return u, s, vh


def qr_and_svd(bs: Sequence[Tensor], as_: Sequence[Tensor], driver: str | None) -> list[Usv]:
    """U, s and Vᵀ of every module in float32: QRs of all factors of a shape at once, then SVDs of all cores at once."""

    def qr(xs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for i, x in enumerate(xs):
            groups[x.shape].append(i)
        for chosen in groups.values():
            q, r = torch.linalg.qr(torch.stack([xs[i] for i in chosen]).float())
            found |= dict(zip(chosen, zip(q, r, strict=True), strict=True))
        return [found[i] for i in range(len(xs))]

    qrs = list(zip(qr(bs), qr([a.mT for a in as_]), strict=True))
    w, s, zh = svd(torch.stack([r_b @ r_a.mT for (_, r_b), (_, r_a) in qrs]), driver)
    return [(q_b @ w[i], s[i], (q_a @ zh[i].mT).mT) for i, ((q_b, _), (q_a, _)) in enumerate(qrs)]


def write(found: Sequence[Usv], factors: Factors) -> None:
    """B' = U diag(√s') and A' = diag(√s') Vᵀ."""
    for (u, _, vh), (_, _, s_new, (b_out, a_out)) in zip(found, factors, strict=True):
        root = s_new.sqrt().to(u)
        b_out.copy_(u * root)
        a_out.copy_(root[:, None] * vh)


def products(spectra: Sequence[Any], factors: Factors) -> None:
    """The same from B, A and the transforms of our spectra, by two products of torch per module, in float32."""
    for spectrum, (_, _, s_new, (b_out, a_out)) in zip(spectra, factors, strict=True):
        f, root = spectrum.factored, s_new.sqrt()
        b_out.copy_(f.basis_b.float() @ (f.t_b * root).float())
        a_out.copy_((f.t_a * root).mT.float() @ f.basis_a.float())


def products_per_sample(p: Tensor, q: Tensor, starts: Tensor) -> Tensor:
    """Sums of p ⊙ q over each sample."""
    terms = torch.split(p.float() * q.float(), starts.diff().tolist())
    return torch.stack([x.sum(0) for x in terms])


def hooked(modules: Sequence[Module], starts: Tensor) -> list[Tensor]:
    """From cached x and dy: both projections, and the sums of their products over each sample."""
    return [products_per_sample(x @ vh.mT, dy @ u, starts) for x, dy, u, vh in modules]


def piecewise_spline(x: Tensor, values: Tensor, s_in: Tensor, s_out: Tensor) -> Tensor:
    """A piecewise linear spline on [-3, 3] by hard indexing, as it is written in torch, in float32."""
    last = len(values) - 1
    u = ((x.clamp(-3, 3) * s_in + 3) / (6 / last)).clamp(0, last)
    i = u.floor().long().clamp(max=last - 1)
    t = u - i
    return (((1 - t) * values[i] + t * values[i + 1]) * s_out).to(x.dtype)


def splined(
    spline: Callable[..., Tensor], x: Tensor, dy: Tensor, values: Tensor, s_in: Tensor, s_out: Tensor
) -> dict[str, Tensor]:
    """A spline and its gradients by x, values and scales."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, values, s_in, s_out)]
        y = spline(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), **dict(zip(("dx", "values", "s_in", "s_out"), gradients, strict=True))}


Branch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def forward_only(
    branch: Branch, x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float
) -> dict[str, Tensor]:
    """The branch without a graph."""
    with torch.no_grad():
        return {"out": branch(x, y, u, s, vh, scaling)}


def forward_and_backward(
    branch: Branch, x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, dy: Tensor
) -> dict[str, Tensor]:
    """The branch and its gradients by x and s."""
    with torch.enable_grad():
        x, s = x.detach().requires_grad_(), s.detach().requires_grad_()
        out = branch(x, y, u, s, vh, scaling)
        dx, g = torch.autograd.grad(out, (x, s), dy)
    return {"out": out.detach(), "dx": dx, "g": g}


def by_hooks(x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, dy: Tensor) -> dict[str, Tensor]:
    """The method as published: a plain LoRA branch B (A x), x and dy caught by hooks, both projections formed again."""
    root = s.sqrt()
    b, a = (u * root).to(u.dtype), (root[:, None] * vh).to(vh.dtype)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = y + scaling * linear(linear(x, a), b)
        [dx] = torch.autograd.grad(out, x, dy)
    g = scaling * ((x.detach() @ vh.mT).float() * (dy @ u).float()).sum(0)
    return {"out": out.detach(), "dx": dx, "g": g}

"""What must hold before a time counts; every bound is derived from rounding, none is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_fast.bench import peers
from spectral_fast.bench.factors import Factors
from spectral_fast.kernels.spline import spline_reference

EPS32 = torch.finfo(torch.float32).eps
RATIO = 30  # LAPACK's own limit of a test ratio
PROBES = 8
SIGMAS = 8


class WrongResult(AssertionError):
    """An implementation is wrong: its time means nothing."""


def amplified(s: Tensor) -> Tensor:
    """The new values s' = s (0.8 + 0.4 (s / s_max)²): small ones shrink, large ones grow, as in the method.

    Being an odd polynomial it has ΔW' = B (0.8 I + 0.4 A Aᵀ Bᵀ B / s_max²) A, which needs no SVD to check.
    """
    return s * (0.8 + 0.4 * (s / s.amax()) ** 2)


def probe_error(b: Tensor, a: Tensor, wanted: Callable[[Tensor], Tensor]) -> Tensor:
    """Estimate of ‖B A − X‖_F without forming either: ‖(B A − X) Ω‖_F / √8 for a Gaussian Ω with 8 columns.

    Args:
        b: (m, r).
        a: (r, n), of the same dtype.
        wanted: Ω (n, 8) -> X Ω (m, 8).
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(a.shape[1], PROBES, generator=generator, dtype=a.dtype).to(a.device)
    estimate: Tensor = (b @ (a @ probes) - wanted(probes)).norm() / PROBES**0.5
    return estimate


def check_rebuilt(implementation: str, factors: Factors, s: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Singular values `found` against `s` (float64), and ``factors.outs`` against the polynomial.

    The error may be 30 r ε ‖B‖‖A‖, the contract of the SVD in float32, times 2, the polynomial's greatest slope,
    once for the vectors and once for s', which comes from `s` and not from `found`; and 2 u ‖ΔW'‖ from rounding
    B' and A' to their dtype; all doubled, as the estimate is random. The estimate itself is taken in float32,
    which adds some ε ‖B‖‖A‖, far below the first term.
    """
    for i, ((b, a, s_new, (b_new, a_new)), mine, true) in enumerate(zip(factors, found, s, strict=True)):
        rank, top = b.shape[1], true.amax()
        wrong_s = float((mine.double() - true).abs().amax() / (RATIO * rank * EPS32 * top))
        b32, a32 = b.float(), a.float()

        def polynomial(probes: Tensor, b: Tensor = b32, a: Tensor = a32, top: Tensor = top) -> Tensor:
            y = a @ probes
            return b @ (0.8 * y + 0.4 / float(top) ** 2 * (a @ (a.mT @ (b.mT @ (b @ y)))))

        error = probe_error(b_new.float(), a_new.float(), polynomial)
        contract = 2 * 2 * RATIO * rank * EPS32 * b32.norm() * a32.norm()
        bound = 2 * (contract + torch.finfo(b_new.dtype).eps * s_new.norm())
        if not (wrong_s <= 1 and error <= bound):
            raise WrongResult(
                f"{implementation}, module {i}: the error of B'A' must be at most {bound:.2e}, got {error:.2e}; that "
                f"of the singular values is {wrong_s:.2g} of what is allowed"
            )


def check_svd(implementation: str, matrices: Tensor, usv: tuple[Tensor, Tensor, Tensor]) -> None:
    """LAPACK's test ratios of every matrix, taken in float64: residual, orthogonality of U and V, order of s."""
    unit = matrices.shape[-1] * torch.finfo(matrices.dtype).eps
    matrices = matrices.double()
    u, s, vh = (x.double() for x in usv)
    eye = torch.eye(matrices.shape[-1], dtype=torch.float64, device=matrices.device)
    residual = (matrices - (u * s[..., None, :]) @ vh).norm(dim=(-2, -1)) / matrices.norm(dim=(-2, -1))
    ratios = {
        "residual": residual,
        "orthogonality of U": (u.mT @ u - eye).norm(dim=(-2, -1)),
        "orthogonality of V": (vh @ vh.mT - eye).norm(dim=(-2, -1)),
    }
    for what, errors in ratios.items():
        ratio = float(errors.amax() / unit)
        if not ratio <= RATIO:
            raise WrongResult(f"{implementation}: {what} must be at most {RATIO} r ε, got {ratio:.3g} r ε")
    if not ((s[:, 1:] <= s[:, :-1]).all() and (s >= 0).all()):
        raise WrongResult(f"{implementation}: singular values must be sorted and not negative")


def check_sensitivity(
    implementation: str, pairs: Sequence[tuple[Tensor, Tensor]], starts: Tensor, sums: Sequence[Tensor]
) -> None:
    """Against sums in float64; a sum of n terms in float32 may err by n u Σ |p q|, u = ε / 2."""
    lengths = starts.diff()
    for i, ((p, q), mine) in enumerate(zip(pairs, sums, strict=True)):
        terms = torch.split(p.double() * q.double(), lengths.tolist())
        exact = torch.stack([x.sum(0) for x in terms])
        bound = lengths[:, None] * EPS32 / 2 * torch.stack([x.abs().sum(0) for x in terms])
        if not ((mine - exact).abs() <= bound).all():
            worst = float(((mine - exact).abs() / bound).amax())
            raise WrongResult(f"{implementation}, module {i}: a sum errs by {worst:.3g} of its bound")


def projected(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The product x V in float64, and how large it and its rounding errors are: |x V| + √(x² V²), elementwise.

    Errors of many roundings have random signs: a sum Σ a_i δ_i of independent |δ_i| ≤ u exceeds SIGMAS u √Σ a_i² once
    in 10¹³ times (Hoeffding). The worst case, u Σ |a_i|, is √n times as much, and would hide a wrong result.
    """
    x, v = x.double(), v.double()
    p = x @ v
    return p, p.abs() + (x.square() @ v.square()).sqrt()


def branch_in_float64(
    x: Tensor, y: Tensor, dy: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """out, dx and g of ``spectral_linear`` in float64, each with its bound, for any order of the products.

    Roundings to the dtype of x on the way: of a factor that has s in it, of the projection, of s, of their product,
    each u = ε / 2, and sums of n, m or r terms in float32; then of the branch, of its scaling, and of out. For g: of
    both projections, of the scaled one, and of their product; then of the sum, and of the scaled sum.
    """
    (m, r), n, tokens = u.shape, vh.shape[1], len(x)
    eps = torch.finfo(x.dtype).eps
    relative = 4 * eps / 2 + (m + n + r) * EPS32
    (p, p_size), (q, q_size), sd = projected(x, vh.mT), projected(dy, u), s.double()

    def expanded(p: Tensor, size: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        branch = scaling * (p * sd) @ u.double().mT
        error = scaling * ((size * sd).square() @ u.double().square().mT).sqrt()
        return branch, SIGMAS * relative * error + eps * branch.abs()

    (out, out_bound), (dx, dx_bound) = expanded(p, p_size, u), expanded(q, q_size, vh.mT)
    out += y.double()
    g, terms = scaling * (p * q).sum(0), scaling * (p_size * q_size)
    g_bound = SIGMAS * relative * terms.square().sum(0).sqrt() + tokens * EPS32 * terms.sum(0) + eps * g.abs()
    return {"out": (out, out_bound + eps / 2 * out.abs()), "dx": (dx, dx_bound + eps / 2 * dx.abs()), "g": (g, g_bound)}


def check_grouped(
    modules: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    starts: Tensor,
    implementation: str,
    sums: Sequence[Tensor],
) -> None:
    """Sums of (x V) ⊙ (dy U) per sample, against float64; both projections may be rounded to the dtype of x."""
    lengths = starts.diff().tolist()
    for i, ((x, dy, u, vh), mine) in enumerate(zip(modules, sums, strict=True)):
        (p, p_size), (q, q_size) = projected(x, vh.mT), projected(dy, u)
        relative = torch.finfo(x.dtype).eps + (len(u) + vh.shape[1]) * EPS32
        for j, (terms, size) in enumerate(
            zip(torch.split(p * q, lengths), torch.split(p_size * q_size, lengths), strict=True)
        ):
            bound = SIGMAS * relative * size.square().sum(0).sqrt() + len(size) * EPS32 * size.sum(0)
            _within(implementation, f"module {i}, sample {j}", mine[j].double() - terms.sum(0), bound)


def splined_in_float64(
    x: Tensor, dy: Tensor, values: Tensor, s_in: Tensor, s_out: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """A piecewise spline on [-3, 3] and its gradients in float64, each with its bound, for any order of summation.

    Whatever is done to an element is a dozen operations in float32 on numbers up to the values and the number of knots,
    and a rounding to the dtype. Sums of n terms in float32 err as a random walk of n steps: SIGMAS u √n Σ |term|.
    """
    found = peers.splined(spline_reference, *(t.double() for t in (x, dy, values, s_in, s_out)))
    eps, size = torch.finfo(x.dtype).eps, 3 + values.double().abs().max()
    steepest = (values.diff().abs().max() * (len(values) - 1) / 6).double()
    inner = (dy.double() * x.double().clamp(-3, 3)).abs().sum() * steepest * s_out.double().abs()
    walk = SIGMAS * EPS32 / 2 * math.sqrt(x.numel())
    once = 12 * EPS32 * (size + len(values))
    # No more of a value than of all weights; of an output scale than the largest value.
    total = dy.double().abs().sum()
    bounds = {
        "y": once + eps * found["y"].abs(),
        "dx": 12 * EPS32 * steepest * dy.double().abs() + eps * found["dx"].abs(),
        "values": (walk + once) * total * s_out.abs(),
        "s_in": (walk + once) * inner,
        "s_out": (walk + once) * total * size,
    }
    return {name: (exact, bounds[name]) for name, exact in found.items()}


def check_terms(truth: dict[str, tuple[Tensor, Tensor]], implementation: str, found: dict[str, Tensor]) -> None:
    """Tensors by name, against those in float64 and their bounds."""
    for name, mine in found.items():
        exact, bound = truth[name]
        _within(implementation, name, mine.double() - exact, bound)


def _within(implementation: str, what: str, error: Tensor, bound: Tensor) -> None:
    if not (error.abs() <= bound).all():
        worst = float((error.abs() / bound).amax())
        raise WrongResult(f"{implementation}, {what}: an element errs by {worst:.3g} of its bound")

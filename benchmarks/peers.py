"""The implementations that are compared: ours, the reference, and what people run today.

Those of ``REBUILD`` find the singular values of every module and write B' = U diag(√s'), A' = diag(√s') Vᵀ
for the given s' into the given memory. Those of ``SVD`` return U, s and Vᵀ of a batch of matrices, those of
``SENSITIVITY`` the sums of p ⊙ q per sample, (samples, r), of every module, those of ``SPLINE`` a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.tasks import DENSE_SVD, ORIGINAL, OURS, PEFT, QR_SVD, SVD_EACH, SVD_LOWRANK, VALUES_ALONE, WHOLE
from spectral_fast.bench.factors import Factors
from spectral_fast.bench.peers import piecewise_spline
from spectral_fast.kernels.batched_svd import batched_svd
from spectral_fast.kernels.lowrank_svd import reference
from spectral_fast.kernels.sensitivity import op as sensitivity
from spectral_fast.kernels.sensitivity import segment_products
from spectral_fast.kernels.spline import spline
from spectral_fast.spectrum import lowrank_svd, rebuild

Pairs = list[tuple[Tensor, Tensor]]  # p and q of each module


def ours(factors: Factors) -> list[Tensor]:
    """Spectra of all modules in one call, then all factors anew."""
    spectra = lowrank_svd(factors.bs, factors.as_)
    rebuild(spectra, factors.s_new, factors.outs)
    return [spectrum.s for spectrum in spectra]


def by_reference(factors: Factors) -> list[Tensor]:
    """The kernel's definition: QR and SVD in float64."""
    found = []
    for b, a, s_new, (b_out, a_out) in factors:
        x, root = reference.factor(b, a, "a module"), s_new.sqrt()
        b_out.copy_(x.basis_b @ (x.t_b * root))
        a_out.copy_((x.t_a * root).mT @ x.basis_a)
        found.append(x.s)
    return found


def per_module(factors: Factors) -> list[Tensor]:
    """The method as published: in float32, per module, two QRs and an SVD, U and V formed."""
    found = []
    for b, a, s_new, (b_out, a_out) in factors:
        q_b, r_b = torch.linalg.qr(b.float())
        q_a, r_a = torch.linalg.qr(a.float().mT)
        w, s, zh = torch.linalg.svd(r_b @ r_a.mT)
        _write(q_b @ w, s_new, (q_a @ zh.mT).mT, b_out, a_out)
        found.append(s)
    return found


def batched(factors: Factors) -> list[Tensor]:
    """As ``per_module``, but one batched SVD of all cores, which must have one rank."""
    qrs = [(torch.linalg.qr(b.float()), torch.linalg.qr(a.float().mT)) for b, a, *_ in factors]
    ws, ss, zhs = torch.linalg.svd(torch.stack([r_b @ r_a.mT for (_, r_b), (_, r_a) in qrs]))
    for ((q_b, _), (q_a, _)), w, zh, (_, _, s_new, outs) in zip(qrs, ws, zhs, factors, strict=True):
        _write(q_b @ w, s_new, (q_a @ zh.mT).mT, *outs)
    return list(ss)


def by_scipy(factors: Factors) -> list[Tensor]:
    """As ``per_module``, with LAPACK through SciPy, inputs overwritten and unchecked."""
    from scipy.linalg import qr, svd

    fast = {"overwrite_a": True, "check_finite": False}
    found = []
    for b, a, s_new, (b_out, a_out) in factors:
        q_b, r_b = qr(b.to(torch.float32, copy=True).numpy(), mode="economic", **fast)
        q_a, r_a = qr(a.to(torch.float32, copy=True).numpy().T, mode="economic", **fast)
        w, s, zh = svd(r_b @ r_a.T, **fast)
        _write(torch.from_numpy(q_b @ w), s_new, torch.from_numpy((q_a @ zh.T).T), b_out, a_out)
        found.append(torch.from_numpy(s))
    return found


def by_svd_lowrank(factors: Factors) -> list[Tensor]:
    """ΔW formed, then torch's randomized SVD with its default of two power iterations."""
    found = []
    for b, a, s_new, (b_out, a_out) in factors:
        u, s, v = torch.svd_lowrank(b.float() @ a.float(), q=b.shape[1])
        _write(u, s_new, v.mT, b_out, a_out)
        found.append(s)
    return found


def by_peft(factors: Factors) -> list[Tensor]:
    """PEFT's SVD of a module: the helper of ``add_weighted_adapter(combination_type="svd")``.

    The public function takes another way if it is given a single adapter. The helper returns Vᵀ and U diag(s);
    s' goes into the latter. Making the layer takes milliseconds of seconds.
    """
    from peft import LoraConfig, get_peft_model

    found = []
    for b, a, s_new, (b_out, a_out) in factors:
        (m, r), n = b.shape, a.shape[1]
        layers = torch.nn.ModuleDict({"layer": torch.nn.Linear(n, m, bias=False)})
        model = get_peft_model(layers, LoraConfig(r=r, lora_alpha=r, target_modules=["layer"]))
        layer = model.base_model.model["layer"]
        layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data = b.float(), a.float()
        decompose = model.base_model._svd_generalized_task_arithmetic_weighted_adapter
        vh, us = decompose("svd", ["default"], [1.0], r, layer, None, None, None, None)
        s = us.norm(dim=0)
        b_out.copy_(us * (s_new / s))
        a_out.copy_(vh)
        found.append(s)
    return found


def _write(u: Tensor, s_new: Tensor, vh: Tensor, b_out: Tensor, a_out: Tensor) -> None:
    root = s_new.sqrt().to(u)
    b_out.copy_(u * root)
    a_out.copy_(root[:, None] * vh)


def svd_batched(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's batched SVD."""
    u, s, vh = torch.linalg.svd(matrices)
    return u, s, vh


def svd_one_by_one(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's SVD in a loop."""
    return _stacked([torch.linalg.svd(matrix) for matrix in matrices])


def svd_scipy(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SciPy's SVD in a loop (LAPACK's gesdd)."""
    from scipy.linalg import svd

    found = [svd(matrix.numpy(), check_finite=False) for matrix in matrices]
    return _stacked([tuple(map(torch.from_numpy, usv)) for usv in found])


def _stacked(found: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = (torch.stack(list(parts)) for parts in zip(*found, strict=True))
    return u, s, vh


def our_sensitivity(pairs: Pairs, starts: Tensor) -> list[Tensor]:
    """The kernel, once per module."""
    return [segment_products(p, q, starts) for p, q in pairs]


def sensitivity_reference(pairs: Pairs, starts: Tensor) -> list[Tensor]:
    """The kernel's definition, which is also what one would write: a product and a sum per sample in torch."""
    return [sensitivity.reference(p, q, starts) for p, q in pairs]


REBUILD: dict[str, Callable[[Factors], list[Tensor]]] = {
    OURS: ours,
    "reference": by_reference,
    "torch QR + SVD": per_module,
    "torch batched SVD": batched,
    "SciPy QR + SVD": by_scipy,
    "torch.svd_lowrank": by_svd_lowrank,
    "PEFT svd": by_peft,
}
SVD: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    OURS: batched_svd,
    "torch batched SVD": svd_batched,
    "torch SVD one by one": svd_one_by_one,
    "SciPy one by one": svd_scipy,
}
SPLINE: dict[str, Callable[..., Tensor]] = {OURS: spline, "torch piecewise": piecewise_spline}
SENSITIVITY: dict[str, Callable[[Pairs, Tensor], list[Tensor]]] = {
    OURS: our_sensitivity,
    "reference": sensitivity_reference,
}

# These form ΔW. One module is run, and its time is multiplied by what the others cost beside it: m n r for the
# products of ΔW with thin matrices, m n min(m, n) for a full SVD.
DENSE_COST: dict[str, Callable[[int, int, int], int]] = {
    "torch.svd_lowrank": lambda m, n, r: m * n * r,
    "PEFT svd": lambda m, n, _: m * n * min(m, n),
}
# What may be faster with one thread than with all is run with both.
ONE_THREAD_TOO = (
    *(QR_SVD, VALUES_ALONE, "torch batched SVD", "torch SVD one by one"),
    *(SVD_LOWRANK, DENSE_SVD, PEFT),
    *(ORIGINAL, WHOLE, SVD_EACH),
)

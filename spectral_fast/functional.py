"""The SVD of a product of two factors as a function like torch's own, gradients included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_fast.spectrum import lowrank_svd


def svd_lowrank_factors(b: Tensor, a: Tensor) -> Any:
    """`torch.linalg.svd(b @ a, full_matrices=False)` cut to the rank that b @ a can have, without forming it.

    U diag(S) Vh = b a; unlike `torch.svd_lowrank` nothing is random, and nothing is left out.

    Args:
        b: (..., m, r): bfloat16, float16, float32 or float64.
        a: (..., r, n), on the device of b. The dimensions before are broadcast, as by `matmul`.

    Returns:
        U (..., m, k), S (..., k), descending, and Vh (..., k, n), k = min(m, r, n), by these names or in this order, on
        the factors' device, in float64 if one factor is, else in float32 (torch has no SVD in half precision). Where
        b a has a smaller rank, the last values of S are zero, and U and V are orthonormal all the same.

        Gradients flow to b and a. Those by way of U and Vh need singular values that are distinct and not zero,
        as in torch, and are NaN otherwise: leave dead ranks out first. (0 / 0 = 0 would be right for a loss of some
        other directions, but silently wrong for one of U diag(S) Vh.) Those by way of S alone are finite.

    Raises:
        TypeError: a factor is no tensor, or of another dtype.
        ValueError: the factors do not fit, are on two devices, have no entries, or hold a NaN or an infinity.

    Example:
        >>> import torch
        >>> from spectral_fast import svd_lowrank_factors
        >>> b, a = torch.randn(64, 4, requires_grad=True), torch.randn(4, 32)
        >>> U, S, Vh = svd_lowrank_factors(b, a)
        >>> bool(torch.dist(U * S @ Vh, b @ a) < 1e-3)
        True
        >>> S.sum().backward()  # the nuclear norm, whose gradient by b a is U Vh
        >>> bool(torch.dist(b.grad, (U @ Vh @ a.mT).detach()) < 1e-3)
        True
    """
    for x, name in ((b, "b"), (a, "a")):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
        if x.ndim < 2 or 0 in x.shape:
            raise ValueError(f"{name} must be a matrix with entries, or a batch of them; got shape {tuple(x.shape)}")
    if b.shape[-1] != a.shape[-2]:
        raise ValueError(f"b (..., m, r) and a (..., r, n) share r; got {tuple(b.shape)} and {tuple(a.shape)}")
    try:
        batch = torch.broadcast_shapes(b.shape[:-2], a.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"the batches of b {tuple(b.shape)} and a {tuple(a.shape)} do not fit: {error}") from error
    b, a = b.expand(*batch, *b.shape[-2:]), a.expand(*batch, *a.shape[-2:])
    return torch.return_types.linalg_svd(_Svd.apply(b, a))  # type: ignore[attr-defined, no-untyped-call]


class _Svd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(torch.promote_types(b.dtype, a.dtype), torch.float32)
        if dtype == torch.float64:
            b, a = b.double(), a.double()
        batch, k = b.shape[:-2], min(b.shape[-2], b.shape[-1], a.shape[-1])
        names = [f"the product at {index}" for index in range(batch.numel())] if batch else ["the product"]
        spectra = lowrank_svd(b.reshape(-1, *b.shape[-2:]).unbind(), a.reshape(-1, *a.shape[-2:]).unbind(), names)
        u = torch.stack([x.u[:, :k] for x in spectra]).to(dtype)
        s = torch.stack([x.s[:k] for x in spectra]).to(dtype)
        vh = torch.stack([x.vh[:k] for x in spectra]).to(dtype)
        u, s, vh = (x.reshape(*batch, *x.shape[1:]) for x in (u, s, vh))
        ctx.save_for_backward(b, a, u, s, vh)
        ctx.set_materialize_grads(False)
        return u, s, vh

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor]:
        """With dP = dB A + B dA in the differential of an SVD of P (Townsend, "Differentiating the SVD", 2016).

        The gradient by P is G = U X Vh + (1 - U Uᵀ) gU diag(1/S) Vh + U diag(1/S) gVh (1 - V Vᵀ), where
        X = diag(gS) + [Uᵀ gU] S + S [Vᵀ gV], [Y] = (Y - Yᵀ)_ij / (S_j² - S_i²); and gB = G Aᵀ, gA = Bᵀ G.
        """
        b, a, u, s, vh = ctx.saved_tensors
        g_u, g_s, g_vh = grads
        b, a = b.to(s.dtype), a.to(s.dtype)
        x = torch.zeros(*s.shape, s.shape[-1], dtype=s.dtype, device=s.device)
        if g_s is not None:
            x = x + torch.diag_embed(g_s)
        left = right = None  # what reaches out of the spans of U and V, over S
        squares = s.square()
        gaps = squares.unsqueeze(-2) - squares.unsqueeze(-1)
        gaps.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        if g_u is not None:
            inner = u.mT @ g_u
            x = x + (inner - inner.mT) / gaps * s.unsqueeze(-2)
            left = (g_u - u @ inner) / s.unsqueeze(-2)
        if g_vh is not None:
            inner = vh @ g_vh.mT
            x = x + s.unsqueeze(-1) * ((inner - inner.mT) / gaps)
            right = (g_vh - inner.mT @ vh) / s.unsqueeze(-1)
        columns = u @ x if left is None else u @ x + left
        g_b, g_a = columns @ (vh @ a.mT), (b.mT @ columns) @ vh
        if right is not None:
            g_b, g_a = g_b + u @ (right @ a.mT), g_a + (b.mT @ u) @ right
        return g_b, g_a

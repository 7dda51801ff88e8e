"""The Gram route: Gram matrices in float64, Cholesky, and the SVD of the r × r core, natively, one module per thread.

Squaring a factor squares its condition number, so each result comes with an estimate of the orthogonality
that was lost, and a module that lost too much (B = 0, a dead rank, duplicated columns) is done again by QR.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from spectral_fast.backends import define
from spectral_fast.kernels import native
from spectral_fast.kernels.lowrank_svd import reference
from spectral_fast.kernels.lowrank_svd.reference import Factored, not_finite

# The loss ‖UᵀU − I‖_F that is accepted, per direction: LAPACK's test ratio of 1, in units of float32, where
# the contract allows 30.
ACCEPTED_LOSS = torch.finfo(torch.float32).eps
_one_at_a_time = Lock()  # the number of threads is the process' own
# SvdStatus in csrc/kernels.h.
NOT_FINITE = {2: "B", 3: "A"}


def refuses(bs: Sequence[Tensor] = (), as_: Sequence[Tensor] = (), names: Sequence[str] = ()) -> str | None:  # noqa: ARG001
    """Wants the native module, and factors in host memory."""
    return native.refuses((*bs, *as_))


def lowrank_svd(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str]) -> list[Factored]:
    """The SVD of each b @ a; B and A themselves are the bases wherever their condition allows it."""
    # A thread that asked torch for the first time while the QR of another ran would keep its one thread for good.
    with _one_at_a_time:
        torch.get_num_threads()
    # Gram matrices of float64 factors would be accurate to float32 only: those take the QR.
    narrow = [i for i, (b, a) in enumerate(zip(bs, as_, strict=True)) if torch.float64 not in (b.dtype, a.dtype)]
    flat, quality, status = _gram_svd([bs[i] for i in narrow], [as_[i] for i in narrow])
    results: list[Factored | None] = [None] * len(bs)
    outcomes = zip(narrow, quality.tolist(), status.tolist(), strict=True)
    position = 0
    for i, (loss, amplification), outcome in outcomes:
        if outcome in NOT_FINITE:
            raise not_finite(names[i], NOT_FINITE[outcome])
        r = bs[i].shape[1]
        s, t_b, t_a = flat[position : position + r + 2 * r * r].split([r, r * r, r * r])
        position += r + 2 * r * r
        if loss <= ACCEPTED_LOSS * r:
            results[i] = Factored(bs[i], t_b.view(r, r), s, t_a.view(r, r), as_[i], amplification)
    return [done or _by_qr(b, a, name) for done, b, a, name in zip(results, bs, as_, names, strict=True)]


def _by_qr(b: Tensor, a: Tensor, name: str) -> Factored:
    """The reference on one thread: more would change its bits, and they shall not depend on the number of threads."""
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return reference.factor(b, a, name)
        finally:
            torch.set_num_threads(threads)


def gram_svd(bs: Sequence[Tensor], as_: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """s, T_B and T_A of every module with U = B T_B and V = Aᵀ T_A, and how good they are.

    Returns:
        s (r,), T_B (r, r) and T_A (r, r) of each module, one after the other, as one float64 vector; per module
        (modules, 2) float64 an estimate of max(‖UᵀU − I‖_F, ‖VᵀV − I‖_F), infinite where a step failed, and the
        amplification of `Factored`; and a status (modules,) int32.
    """
    from spectral_fast import _C

    if any(b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] for b, a in zip(bs, as_, strict=True)):
        raise ValueError("each b (m, r) and a (r, n) must share r")
    bs, as_ = [b.contiguous() for b in bs], [a.contiguous() for a in as_]
    rows = [
        (b.data_ptr(), a.data_ptr(), b.shape[0], a.shape[1], b.shape[1], native.CODES[b.dtype], native.CODES[a.dtype])
        for b, a in zip(bs, as_, strict=True)
    ]
    flat, quality, status = _results([b.shape[1] for b in bs])
    _C.lowrank_svd(native.table(rows, 7), flat.numpy(), quality.numpy(), status.numpy(), torch.get_num_threads())
    return flat, quality, status


def _results(ranks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    count = len(ranks)
    flat = torch.empty(sum(r + 2 * r * r for r in ranks), dtype=torch.float64)
    return flat, torch.empty(count, 2, dtype=torch.float64), torch.empty(count, dtype=torch.int32)


_gram_svd = define(
    "gram_svd",
    "(Tensor[] b, Tensor[] a) -> (Tensor flat, Tensor quality, Tensor status)",
    gram_svd,
    lambda bs, _: _results([b.shape[1] for b in bs]),
)

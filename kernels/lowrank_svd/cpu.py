"""The Gram route natively, one module per thread: Gram matrices in float64, Cholesky, and the SVD of the r × r core."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from spectral_fast.backends import define
from spectral_fast.kernels import native
from spectral_fast.kernels.lowrank_svd import gram, reference
from spectral_fast.kernels.lowrank_svd.reference import Factored

EPS32 = torch.finfo(torch.float32).eps
_one_at_a_time = Lock()  # the number of threads is the process' own


def refuses(bs: Sequence[Tensor] = (), as_: Sequence[Tensor] = (), names: Sequence[str] = ()) -> str | None:  # noqa: ARG001
    """Wants the native module, and factors in host memory."""
    return native.refuses((*bs, *as_))


def lowrank_svd(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str]) -> list[Factored]:
    """The SVD of each b @ a; B and A themselves are the bases wherever their condition allows it."""
    # A thread that asked torch for the first time while the QR of another ran would keep its one thread for good.
    with _one_at_a_time:
        torch.get_num_threads()
    return gram.lowrank_svd(bs, as_, names, _solve, _by_qr)


def _solve(bs: Sequence[Tensor], as_: Sequence[Tensor]) -> gram.Solved:
    flat, quality = _gram_svd(bs, as_)
    ranks = [b.shape[1] for b in bs]
    parts = flat.split([size for r in ranks for size in (r, r * r, r * r)])
    triples = zip(ranks, parts[::3], parts[1::3], parts[2::3], strict=True)
    return gram.Solved(((s, t_b.view(r, r), t_a.view(r, r)) for r, s, t_b, t_a in triples), quality.tolist())


def _by_qr(b: Tensor, a: Tensor, name: str) -> Factored:
    """The reference on one thread: more would change its bits, and they shall not depend on the number of threads."""
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return reference.factor(b, a, name)
        finally:
            torch.set_num_threads(threads)


def gram_svd(bs: Sequence[Tensor], as_: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """s, T_B and T_A of every module with U = B T_B and V = Aᵀ T_A, and how good they are.

    Returns:
        s (r,), T_B (r, r) and T_A (r, r) of each module, one after the other, as one float64 vector; and per module
        (modules, 2) float64 the loss and the amplification of `gram.Solved`.
    """
    if any(b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] for b, a in zip(bs, as_, strict=True)):
        raise ValueError("each b (m, r) and a (r, n) must share r")
    return _call(bs, as_, vectors=True)


def singular_values(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """The singular values of each b @ a: eigenvalues of R_B G_A R_Bᵀ, unless a bound on their error asks for more."""
    # The loss is that bound: it may be half of what the contract allows.
    narrow = [i for i, (b, a) in enumerate(zip(bs, as_, strict=True)) if torch.float64 not in (b.dtype, a.dtype)]
    flat, quality = _call([bs[i] for i in narrow], [as_[i] for i in narrow], vectors=False)
    found = dict(zip(narrow, torch.split(flat, [bs[i].shape[1] for i in narrow]), strict=True))
    losses = dict(zip(narrow, quality[:, 0].tolist(), strict=True))
    again = [i for i in range(len(bs)) if not losses.get(i, torch.inf) <= 15 * bs[i].shape[1] * EPS32]
    solved = lowrank_svd([bs[i] for i in again], [as_[i] for i in again], [names[i] for i in again])
    found |= {i: x.s for i, x in zip(again, solved, strict=True)}
    return [found[i] for i in range(len(bs))]


def _call(bs: Sequence[Tensor], as_: Sequence[Tensor], vectors: bool) -> tuple[Tensor, Tensor]:
    from spectral_fast import _C

    bs, as_ = [native.readable(b) for b in bs], [native.readable(a) for a in as_]
    rows = [
        (b.data_ptr(), a.data_ptr(), b.shape[0], a.shape[1], b.shape[1], native.CODES[b.dtype], native.CODES[a.dtype])
        for b, a in zip(bs, as_, strict=True)
    ]
    flat, quality = _results([b.shape[1] for b in bs], vectors)
    status = torch.empty(len(bs), dtype=torch.int32)  # which step failed: whatever it was, the loss is infinite
    arrays = flat.numpy(), quality.numpy(), status.numpy()
    _C.lowrank_svd(native.table(rows, 7), *arrays, torch.get_num_threads(), vectors)
    return flat, quality


def _results(ranks: Sequence[int], vectors: bool = True) -> tuple[Tensor, Tensor]:
    flat = torch.empty(sum(r + 2 * r * r * vectors for r in ranks), dtype=torch.float64)
    return flat, torch.empty(len(ranks), 2, dtype=torch.float64)


_gram_svd = define(
    "gram_svd",
    "(Tensor[] b, Tensor[] a) -> (Tensor flat, Tensor quality)",
    gram_svd,
    lambda bs, _: _results([b.shape[1] for b in bs]),
)

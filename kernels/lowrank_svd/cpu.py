"""The Gram route: Gram matrices in float64, Cholesky, and a native r × r SVD with one matrix per thread.

Squaring a factor squares its condition number, so each result comes with an estimate of the orthogonality
that was lost, and a module that lost too much (B = 0, a dead rank, duplicated columns) is done again by QR.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_fast.backends import define, native_missing
from spectral_fast.kernels.lowrank_svd import reference
from spectral_fast.kernels.lowrank_svd.reference import Factored

# The loss ‖UᵀU − I‖_F that is accepted, per direction: LAPACK's test ratio of 1, in units of float32, where
# the contract allows 30.
ACCEPTED_LOSS = torch.finfo(torch.float32).eps


def refuses(bs: Sequence[Tensor] = (), as_: Sequence[Tensor] = ()) -> str | None:
    """Wants the native module, and factors in host memory."""
    elsewhere = {str(x.device) for x in (*bs, *as_) if x.device.type != "cpu"}
    return f"factors are on {', '.join(sorted(elsewhere))}" if elsewhere else native_missing()


def lowrank_svd(bs: Sequence[Tensor], as_: Sequence[Tensor]) -> list[Factored]:
    """The SVD of each b @ a; B and A themselves are the bases wherever their condition allows it."""
    # Gram matrices of float64 factors would be accurate to float32 only: those take the QR.
    narrow = [i for i, (b, a) in enumerate(zip(bs, as_, strict=True)) if torch.float64 not in (b.dtype, a.dtype)]
    t_bs, ss, t_as, losses = _gram_svd([bs[i] for i in narrow], [as_[i] for i in narrow])
    results: dict[int, Factored] = {}
    for i, t_b, s, t_a, loss in zip(narrow, t_bs, ss, t_as, losses.tolist(), strict=True):
        if loss <= ACCEPTED_LOSS * s.shape[0]:
            results[i] = Factored(bs[i], t_b, s, t_a, as_[i])
    return [results.get(i) or reference.factor(b, a) for i, (b, a) in enumerate(zip(bs, as_, strict=True))]


def gram_svd(bs: Sequence[Tensor], as_: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """T_B, s, T_A of every module with U = B T_B and V = Aᵀ T_A, and the orthogonality that each lost.

    Returns:
        t_b (r, r), s (r,), t_a (r, r) for each module, and losses (modules,), all float64. A loss is an
        estimate of max(‖UᵀU − I‖_F, ‖VᵀV − I‖_F), infinite where a step failed.
    """
    by_rank: defaultdict[int, list[int]] = defaultdict(list)
    for i, b in enumerate(bs):
        by_rank[b.shape[1]].append(i)
    t_bs, ss, t_as = [Tensor()] * len(bs), [Tensor()] * len(bs), [Tensor()] * len(bs)
    losses = torch.empty(len(bs), dtype=torch.float64)
    for rank, members in by_rank.items():
        grams = torch.empty(2, len(members), rank, rank, dtype=torch.float64)
        for j, i in enumerate(members):
            _gram(bs[i], grams[0, j])
            _gram(as_[i].mT, grams[1, j])
        lengths = torch.tensor([[len(bs[i]) for i in members], [as_[i].shape[1] for i in members]])
        transforms, s, loss = _solve(grams, lengths)
        for j, i in enumerate(members):
            t_bs[i], ss[i], t_as[i] = transforms[0, j].clone(), s[j].clone(), transforms[1, j].clone()
        losses[members] = loss
    return t_bs, ss, t_as, losses


def _gram(x: Tensor, out: Tensor) -> None:
    wide = x.double()  # products of two float32 numbers are exact in float64
    torch.mm(wide.mT, wide, out=out)


def _solve(grams: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms (2, c, r, r), s (c, r), losses (c,) from Gram matrices (2, c, r, r) of `lengths` rows."""
    from spectral_fast import _C

    rank = grams.shape[-1]
    triangles, _ = torch.linalg.cholesky_ex(grams, upper=True)  # a factor that does not exist shows in the loss
    core = (triangles[0] @ triangles[1].mT).contiguous()
    wt, s = torch.empty_like(core), core.new_empty(core.shape[:2])
    status = torch.empty(len(core), dtype=torch.int32)
    _C.jacobi_svd(core.numpy(), wt.numpy(), s.numpy(), status.numpy(), threads=torch.get_num_threads())
    # R_A⁻¹ Z is R_Bᵀ W diag(1/s), so the core's right vectors are not needed.
    t_b = torch.linalg.solve_triangular(triangles[0], wt.mT, upper=True)
    transforms = torch.stack([t_b, (wt @ triangles[0]).mT / s[:, None]])
    # What these steps lost shows in Tᵀ G T, which is I only if the triangles are Cholesky factors and W is
    # orthogonal. What the Gram matrices had lost before does not show: with d² its diagonal, G errs by about
    # (√length + r) roundoffs of d_i d_j, and T carries that into UᵀU.
    seen = transforms.mT @ grams @ transforms - torch.eye(rank, dtype=torch.float64)
    carried = (grams.diagonal(dim1=-2, dim2=-1)[..., None] * transforms.square()).sum((-2, -1))
    unseen = (lengths.double().sqrt() + rank) * torch.finfo(torch.float64).eps / 2 * carried
    losses = (seen.square().sum((-2, -1)).sqrt() + unseen).amax(0).nan_to_num(nan=math.inf)
    losses[status != 0] = math.inf
    return transforms, s, losses


def _fake(bs: Sequence[Tensor], _: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64)

    ranks = [b.shape[1] for b in bs]
    return (
        [empty(r, r) for r in ranks],
        [empty(r) for r in ranks],
        [empty(r, r) for r in ranks],
        empty(len(bs)),
    )


_gram_svd = define(
    "gram_svd",
    "(Tensor[] b, Tensor[] a) -> (Tensor[] t_b, Tensor[] s, Tensor[] t_a, Tensor loss)",
    gram_svd,
    _fake,
)

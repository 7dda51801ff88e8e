"""Eigenvalues of WᵀW without singular vectors: a Gram matrix of the smaller side and a symmetric solver."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024  # of the longer side, at most, that are widened at a time: no more than the Gram matrix has
COLUMNS = 128, 256  # of the Gram matrix at a time: what lies below its diagonal blocks is not computed


def gram(matrix: Tensor, device: torch.device | None = None) -> Tensor:
    """Upper triangle of the Gram matrix of the smaller side, M Mᵀ or Mᵀ M, in float64.

    Squaring halves the digits: in float64 eigenvalues are good to 1e-16 of the largest, as from an SVD in float32 or
    better; in float32 they would be good to 1e-7 of it, which is more than the small ones of a trained matrix.

    Args:
        matrix: (m, n), any floating-point dtype; widened in blocks of rows of the longer side.
        device: where to compute; the matrix's own if left out.

    Returns:
        (k, k) float64, k = min(m, n); what is below the diagonal has no meaning.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    k = tall.shape[1]
    step = min(max(k // 4, COLUMNS[0]), COLUMNS[1])
    upper = torch.zeros(k, k, dtype=torch.float64, device=device or matrix.device)
    for rows in tall.split(min(max(k, COLUMNS[0]), ROWS)):  # type: ignore[no-untyped-call]
        wide = rows.to(upper.device).double()
        for i in range(0, k, step):
            upper[: i + step, i : i + step].addmm_(wide[:, : i + step].T, wide[:, i : i + step])
    return upper


def slices(weight: Tensor) -> Iterator[Tensor]:
    """The matrices (out, in) of a weight: itself, or one for each position of a convolution's kernel."""
    if weight.ndim == 2:
        yield weight
    else:
        yield from weight.flatten(2).permute(2, 0, 1)


def eigenvalues(gram_matrices: list[Tensor]) -> Tensor:
    """Their eigenvalues, all together, in ascending order; rounding below zero becomes zero.

    Args:
        gram_matrices: from `gram`; the list is emptied, so that each is freed after its turn.

    Returns:
        (values,) float64 on the CPU.
    """
    found = []
    while gram_matrices:
        # LAPACK takes a fifth less time for the upper triangle of a few hundred rows than for the lower one.
        found.append(torch.linalg.eigvalsh(gram_matrices.pop(), UPLO="U").clamp_(min=0).cpu())
    return torch.cat(found).sort().values

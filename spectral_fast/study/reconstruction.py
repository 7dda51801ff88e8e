"""Errors of approximations H to a matrix W, err = ‖W − H‖_F / ‖W‖_F, mostly without forming H.

Where W is a sum of orthogonal pieces (its singular triplets, its columns, its rows) and H has some of them, the error
is the root of the dropped share of ‖W‖_F². The singular values come from the smaller Gram matrix in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Matrix:
    """W (n, m) in float64 with the eigenvectors of its smaller Gram matrix.

    Attributes:
        w: the matrix.
        energies: squared singular values, (p,) for p = min(n, m), descending; NaN if the matrix has NaN or infinity.
        vectors: (p, p), columns in that order: right singular vectors if n ≥ m, else left ones.
    """

    w: Floats
    energies: Floats
    vectors: Floats

    @classmethod
    def of(cls, w: NDArray[Any]) -> Matrix:
        """The matrix with its singular values: n m p + O(p³) flops; exact to 1e-8 of the largest."""
        w = w.astype(np.float64, copy=False)
        if not np.isfinite(w).all():
            p = min(w.shape)
            return cls(w, np.full(p, np.nan), np.full((p, p), np.nan))
        gram = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
        values, vectors = np.linalg.eigh(gram)
        return cls(w, values[::-1].clip(0.0), vectors[:, ::-1])

    @property
    def s(self) -> Floats:
        """Singular values (p,), descending."""
        return np.sqrt(self.energies)

    def right(self, k: int) -> Floats:
        """The first k right singular vectors, as rows (k, m); rows of zeros where the singular value is zero."""
        chosen = self.vectors[:, :k]
        return chosen.T if self._tall else _divided(chosen.T @ self.w, self.s[:k, None])

    @property
    def _tall(self) -> bool:
        return bool(self.w.shape[0] >= self.w.shape[1])


def _divided(x: Floats, by: Floats) -> Floats:
    return np.divide(x, by, out=np.zeros_like(x), where=by > 0)


def largest(scores: Floats, k: int) -> Indices:
    """Indices of the k largest scores, the largest first."""
    return np.argsort(-scores, kind="stable")[:k]


def error_of_keeping(energies: Floats, kept: Indices) -> float:
    """The error of an H that has the pieces `kept` of W, with these squared norms; 0 for zero, NaN if not finite."""
    dropped = np.ones(len(energies), dtype=bool)
    dropped[kept] = False
    total = float(energies.sum())
    if not math.isfinite(total):
        return math.nan
    return math.sqrt(float(energies[dropped].sum()) / total) if total else 0.0


def error_of_product(w: Floats, a: Floats, b: Floats) -> float:
    """The error of H = A B scaled to the norm of W: √(2 − 2 ⟨W, AB⟩ / (‖W‖ ‖AB‖)), about √2 for a random H.

    Args:
        w: (n, m).
        a: (n, k).
        b: (k, m).

    Returns:
        The error; infinite if only W is zero, for H is then not scaled; NaN if W is not finite.
    """
    norm, product = float(np.linalg.norm(w)), math.sqrt(max(0.0, float(((a.T @ a) * (b @ b.T)).sum())))
    if not math.isfinite(norm):
        return math.nan
    if not norm:
        return math.inf if product else 0.0
    if not product:
        return 1.0
    cosine = float(((a.T @ w) * b).sum()) / (norm * product)
    return math.sqrt(max(0.0, 2.0 - 2.0 * cosine))

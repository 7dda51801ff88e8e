"""The subspace that a stream of vectors spans, in k directions: Frequent Directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MODES = ("liberty", "orthonormal")


class FrequentDirections:
    """A sketch of the vectors z₁, z₂, … seen so far: at most k orthonormal directions and, by Liberty, their weights.

    "liberty" holds B = U diag(s) with (U diag(s)² Uᵀ) near the sum of all z zᵀ. A new z is split into U p + ρ r, and

        [U diag(s) | z] [U diag(s) | z]ᵀ = [U | r] (diag(s², 0) + v vᵀ) [U | r]ᵀ,   v = (p, ρ)

    so its eigenvectors need no m × k SVD, and the new U, a product of matrices with orthonormal columns, stays
    orthonormal whatever s is. If k + 1 eigenvalues are left, the least, δ, is taken off all of them. Then
    0 ≤ ‖U diag(s)ᵀx‖² ≤ Σ (zᵀx)² and, for every unit x, the difference is at most Σ δ, which is `error`, and which is
    at most ‖A − A_j‖²_F / (k + 1 − j) for every j ≤ k, A_j the best approximation of rank j to the matrix A of all z.

    "orthonormal" forgets weights: of [U | z], for a unit z, the k first left singular vectors stay. These are U with
    one direction turned: that of U p goes halfway to z. So, with c = ‖p‖, ‖Uᵀz‖² is (1 + c) / 2 afterwards. Where z is
    orthogonal to U any direction may be turned: it is the last one.

    Args:
        m: length of a vector.
        k: most directions kept.
        mode: "liberty" or "orthonormal".
        reorth_every: updates after which rounding errors in the orthogonality of U are taken off.

    Attributes:
        basis: Uᵀ, (directions, m) float64, on the CPU.
        squares: s², (directions,) float64, descending; ones in mode "orthonormal".
        error: the bound above; 0 in mode "orthonormal", which has none.
        updates: vectors seen.

    Raises:
        ValueError: sizes below 1, more directions than coordinates, or an unknown mode.

    Source: Liberty, "Simple and deterministic matrix sketching", KDD 2013; Ghashami, Liberty, Phillips and Woodruff,
    SIAM J. Comput. 45 (2016), theorem 1.1; the eigenvalues of a rank-one update: Bunch, Nielsen and Sorensen 1978.
    """

    def __init__(self, m: int, k: int, mode: str = "liberty", reorth_every: int = 128) -> None:
        if min(m, k, reorth_every) < 1 or k > m:
            raise ValueError(f"wanted 1 <= k <= m and reorth_every >= 1; got k = {k}, m = {m}, {reorth_every}")
        if mode not in MODES:
            raise ValueError(f"fd_mode must be one of {', '.join(MODES)}; got {mode!r}")
        self.m, self.k, self.mode, self.reorth_every = m, k, mode, reorth_every
        self.reset()

    def reset(self) -> None:
        """Forget all vectors."""
        self.basis = torch.zeros(0, self.m, dtype=torch.float64)
        self.squares = torch.zeros(0, dtype=torch.float64)
        self.error, self.updates = 0.0, 0

    def captured(self, z: Tensor) -> float:
        """‖Uᵀz‖² of a vector (m,)."""
        return float((self.basis @ z.detach().to("cpu", torch.float64)).square().sum())

    def update(self, z: Tensor) -> None:
        """Take a vector (m,) in; zeros change nothing.

        Raises:
            ValueError: of another length, or not finite.
        """
        if z.shape != (self.m,):
            raise ValueError(f"a vector must be ({self.m},), got {tuple(z.shape)}")
        z = z.detach().to("cpu", torch.float64)
        length = float(z.norm())
        if not math.isfinite(length):
            raise ValueError("a vector of the stream holds a NaN or an infinity")
        self.updates += 1
        if length == 0:
            return
        if self.mode == "orthonormal":
            self._turn(z / length)
        else:
            self._add(z)
        if self.updates % self.reorth_every == 0:
            # One Newton step towards the nearest orthonormal rows: as near as an error of 1e-8 squared.
            self.basis = 1.5 * self.basis - 0.5 * (self.basis @ self.basis.mT) @ self.basis

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor, float]:
        """Coordinates p = Uᵀz, the unit vector r and ρ of z = U p + ρ r; ρ = 0 if nothing but rounding is left of z."""
        p = self.basis @ z
        rest = z - p @ self.basis
        first, again = float(rest.norm()), self.basis @ rest
        rest -= again @ self.basis
        rho = float(rest.norm())
        if rho < first / 2:  # what was left lay in the span of U, too: it is rounding
            return p + again, rest, 0.0
        return p + again, rest / rho, rho

    def _turn(self, z: Tensor) -> None:
        p, rest, rho = self._split(z)
        if len(self.basis) < self.k:
            if rho:
                self.basis, self.squares = torch.vstack([self.basis, rest]), torch.ones(len(self.basis) + 1).double()
            return
        c = float(p.norm())
        if c:
            p /= c
        else:
            p[-1] = 1
        turned, angle = p @ self.basis, math.atan2(rho, c) / 2
        self.basis.addr_(p, (math.cos(angle) - 1) * turned + math.sin(angle) * rest)

    def _add(self, z: Tensor) -> None:
        p, rest, rho = self._split(z)
        rows, squares = self.basis, self.squares
        if rho:
            rows = torch.vstack([rows, rest])
            squares, p = torch.cat([squares, squares.new_zeros(1)]), torch.cat([p, p.new_tensor([rho])])
        values, vectors = torch.linalg.eigh(squares.diag() + p[:, None] * p)
        values, vectors = values.flip(0), vectors.mT.flip(0)
        if len(values) > self.k:
            least = max(float(values[-1]), 0.0)
            self.error += least
            values, vectors = values[:-1] - least, vectors[:-1]
        kept = int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())
        self.squares, self.basis = values[:kept].clone(), vectors[:kept] @ rows

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {"basis": self.basis, "squares": self.squares, "error": self.error, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the sketch that gave it.

        Raises:
            ValueError: it is of other sizes.
        """
        basis, squares = state["basis"], state["squares"]
        if basis.shape != (len(squares), self.m) or len(squares) > self.k:
            raise ValueError(f"a sketch of m = {self.m}, k = {self.k} cannot go on from {tuple(basis.shape)}")
        self.basis, self.squares = (
            basis.to("cpu", torch.float64, copy=True),
            squares.to("cpu", torch.float64, copy=True),
        )
        self.error, self.updates = float(state["error"]), int(state["updates"])

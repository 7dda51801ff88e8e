"""The subspace that a stream of vectors spans, in k directions: Frequent Directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spectral_fast.kernels.frequent_directions import frequent_directions
from spectral_fast.training.gate.names import MODES


class FrequentDirections:
    """A sketch of the vectors z₁, z₂, … seen so far: at most k orthonormal directions and, by Liberty, their weights.

    "liberty" holds B = U diag(s), of which U diag(s²) Uᵀ is near the sum of all z zᵀ. A new z zᵀ is added; if there are
    k + 1 eigenvalues then, the least, δ, is taken off all of them. So 0 ≤ Σ (zᵀx)² − ‖Bᵀx‖² ≤ Σ δ for every unit x;
    that is `error`, and it is at most ‖A − A_j‖²_F / (k + 1 − j) for every j ≤ k, A_j the best approximation of rank j
    to the matrix A of all z. U, a product of matrices with orthonormal columns, stays orthonormal whatever s is.

    "orthonormal" forgets weights: of [U | z], for a unit z, the k first left singular vectors stay. These are U with
    one direction turned: that of U p goes halfway to z. So, with c = ‖p‖, ‖Uᵀz‖² is (1 + c) / 2 afterwards. Where z is
    orthogonal to U any direction may be turned: it is the last one.

    Args:
        m: length of a vector.
        k: most directions kept.
        mode: "liberty" or "orthonormal".
        reorth_every: updates after which rounding errors in the orthogonality of U are taken off.

    Attributes:
        basis: Uᵀ, (k, m) float64, on the CPU: orthonormal rows, and zeros below the first `rank` ones.
        squares: s², (k,) float64, descending, zeros where basis is; ones instead in mode "orthonormal".
        error: the bound above; 0 in mode "orthonormal", which has none.
        updates: vectors seen.

    Raises:
        ValueError: sizes below 1, more directions than coordinates, or an unknown mode.

    Source: Liberty, "Simple and deterministic matrix sketching", KDD 2013; Ghashami, Liberty, Phillips and Woodruff,
    SIAM J. Comput. 45 (2016), theorem 1.1.
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
        self.basis = torch.zeros(self.k, self.m, dtype=torch.float64)
        self.squares = torch.zeros(self.k, dtype=torch.float64)
        self.error, self.updates = 0.0, 0

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return int(self.squares.count_nonzero())

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
        if self.mode == "liberty":
            self.basis, self.squares, removed = frequent_directions(self.basis, self.squares, z)
            self.error += removed
        else:
            self._turn(z)
        self.updates += 1
        if self.updates % self.reorth_every == 0:
            # One Newton step towards the nearest orthonormal rows, from an error of 1e-8 or less to its square.
            self.basis = 1.5 * self.basis - 0.5 * (self.basis @ self.basis.mT) @ self.basis

    def _turn(self, z: Tensor) -> None:
        length = float(z.norm())
        if not math.isfinite(length):
            raise ValueError("z holds a NaN or an infinity")
        if length == 0:
            return
        z, p = z / length, torch.zeros_like(self.squares)
        rest, rho = z, 1.0
        for _ in range(2):  # twice is enough
            before, part = rho, self.basis @ rest
            p, rest = p + part, rest - part @ self.basis
            rho = float(rest.norm())
        if rho <= before / 2:  # what was left lay in the span of U, too: it was rounding
            return
        rank, c = self.rank, float(p.norm())
        if rank < self.k:
            self.basis[rank], self.squares[rank] = rest / rho, 1.0
            return
        if c:
            p /= c
        else:
            p[-1] = 1
        angle = math.atan2(rho, c) / 2
        self.basis.addr_(p, (math.cos(angle) - 1) * (p @ self.basis) + math.sin(angle) / rho * rest)

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {
            "basis": self.basis.clone(),
            "squares": self.squares.clone(),
            "error": self.error,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the sketch that gave it.

        Raises:
            ValueError: it is of other sizes.
        """
        basis, squares = state["basis"], state["squares"]
        if basis.shape != self.basis.shape:
            raise ValueError(f"a sketch of k = {self.k}, m = {self.m} cannot go on from {tuple(basis.shape)}")
        self.basis, self.squares = (x.to("cpu", torch.float64, copy=True) for x in (basis, squares))
        self.error, self.updates = float(state["error"]), int(state["updates"])

"""The Marchenko-Pastur bulk of a random matrix's spectrum, its edge, and the spikes beyond.

Marchenko and Pastur, 1967: entries of variance v give (M, N) matrices, M ≤ N, whose WWᵀ has eigenvalues within
s² (1 ± 1/sqrt(Q))², where Q = N / M and s² = N v is their mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spectral_fast.allocation.tail import Floats

_BANDWIDTH, _GRID, _SPARSE = 0.1, 1000, 0.01  # of the density that `kde` fits, as in WeightWatcher
_TRACY_WIDOM_95 = 0.98  # 95 % quantile of the Tracy-Widom law for real matrices


@dataclass(frozen=True)
class Bulk:
    """The bulk of one spectrum, in the units of its eigenvalues.

    Attributes:
        sigma: s, square root of the mean eigenvalue that the bulk alone would have.
        q: aspect ratio N / M ≥ 1.
        edge: what an eigenvalue of pure noise does not exceed; those beyond are spikes.
    """

    sigma: float
    q: float
    edge: float

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue of the limit of large matrices."""
        a, b = ((self.sigma * (1 + sign / np.sqrt(self.q))) ** 2 for sign in (-1, 1))
        return float(a), float(b)

    def density(self, x: Floats) -> Floats:
        """The law's density at x (values,) > 0."""
        return density(x, self.sigma, self.q)


def fit_bulk(
    eigs: Floats,
    m: int,
    n: int,
    *,
    sigma_method: str = "mean",
    tw_method: str = "ww",
    tracy_widom: bool = True,
    rescale: bool = True,
) -> Bulk:
    """The bulk of a spectrum.

    Args:
        eigs: (values,) not all zero.
        m: smaller side of the matrix.
        n: its larger side.
        sigma_method: how s is estimated. "mean": from the mean of all eigenvalues, spikes included; "median": from
            their median, which spikes hardly move (Gavish and Donoho, 2014); "kde": the s whose law is nearest to a
            density estimate, by WeightWatcher's grid.
        tw_method: "ww" puts the edge sqrt(Q^(-1/2) b^(2/3) M^(-2/3)) above the upper end b, WeightWatcher's correction,
            which is wider than fluctuations are and right only where the mean is 1 (see `rescale`); "johnstone" puts
            it at the 95 % quantile of the largest eigenvalue (Johnstone, 2001), if s is right: the error of "median"
            makes that 90 % in matrices of some dozens of rows.
        tracy_widom: whether to correct at all; else the edge is b.
        rescale: divide the eigenvalues by their mean first, and give the result in their own units again. "ww" is not
            scale-equivariant without.
    """
    q, scale = n / m, float(eigs.mean()) if rescale else 1.0
    sigma = SIGMAS[sigma_method](eigs / scale, q)
    edge = sigma**2 * (1 + 1 / np.sqrt(q)) ** 2
    if tracy_widom and tw_method == "ww":
        edge += np.sqrt(q**-0.5 * edge ** (2 / 3) * m ** (-2 / 3))
    elif tracy_widom:
        roots = np.sqrt(n - 1) + np.sqrt(m)
        width = roots * (1 / np.sqrt(max(n - 1, 1)) + 1 / np.sqrt(m)) ** (1 / 3)
        edge = (roots**2 + _TRACY_WIDOM_95 * width) * sigma**2 / n
    return Bulk(float(sigma * np.sqrt(scale)), q, float(edge * scale))


def density(x: Floats, sigma: float, q: float) -> Floats:
    """Marchenko-Pastur density at x (values,) > 0; zero outside of the bulk."""
    a, b = (sigma * (1 - 1 / np.sqrt(q))) ** 2, (sigma * (1 + 1 / np.sqrt(q))) ** 2
    found: Floats = q * np.sqrt(np.maximum((b - x) * (x - a), 0)) / (2 * np.pi * sigma**2 * x)
    return found


def _by_mean(eigs: Floats, _: float) -> float:
    return float(np.sqrt(eigs.mean()))


def _by_median(eigs: Floats, q: float) -> float:
    return float(np.sqrt(np.median(eigs) / _median(q)))


def _median(q: float) -> float:
    """Of the law with mean 1: on a grid even in the angle, where the density has no singularity for Q > 1."""
    middle, half = 1 + 1 / q, 2 / np.sqrt(q)
    angle = np.linspace(0, np.pi, 20001)[1:-1]
    x = middle - half * np.cos(angle)
    mass = np.cumsum(density(x, 1.0, q) * np.sin(angle))
    return float(np.interp(mass[-1] / 2, mass, x))


def _by_density(eigs: Floats, q: float) -> float:
    """The s on WeightWatcher's grid whose law has the smallest squared distance to the density of the eigenvalues.

    For Q = 1 it is the quarter circle of the singular values that is compared. Where the density is nearly zero
    nothing is; an s whose bulk leaves out the density's peak or goes beyond its range is no candidate.
    """
    values = np.sort(np.sqrt(eigs) if q == 1 else eigs)
    grid = np.linspace(0, values[-1] + 0.5, _GRID)
    found = _kernel_density(values, grid)
    dense = found > _SPARSE
    x, y = np.maximum(grid[dense], 1e-12), found[dense]
    peak, largest = x[y.argmax()], float(np.sqrt(eigs.max())) / (1 + 1 / np.sqrt(q))
    best: tuple[float, float] = (math.inf, largest)
    for sigma in largest * np.arange(0.05, 2.0, 0.01):
        a, b = (sigma * (1 - 1 / np.sqrt(q))) ** 2, (sigma * (1 + 1 / np.sqrt(q))) ** 2
        if q == 1:
            law = np.sqrt(np.maximum(4 * sigma**2 - x**2, 0)) / (np.pi * sigma**2)
        elif a <= peak <= b <= x[-1]:
            law = density(x, sigma, q)
        else:
            continue
        best = min(best, (float(((law - y) ** 2).sum()), float(sigma)))
    return best[1]


def _kernel_density(values: Floats, grid: Floats) -> Floats:
    """With a triangular kernel, by prefix sums: each grid point sees a run of the sorted values."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    left, middle, right = (np.searchsorted(values, grid + shift) for shift in (-_BANDWIDTH, 0, _BANDWIDTH))
    below = sums[middle] - sums[left] - (middle - left) * (grid - _BANDWIDTH)
    above = (right - middle) * (grid + _BANDWIDTH) - (sums[right] - sums[middle])
    found: Floats = (below + above) / (_BANDWIDTH**2 * len(values))
    return found


SIGMAS = {"mean": _by_mean, "median": _by_median, "kde": _by_density}

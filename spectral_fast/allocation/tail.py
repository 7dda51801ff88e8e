"""Exponent of a power law p(λ) ∝ λ^(-alpha) in the upper tail of a spectrum, by Hill's estimator.

Hill, "A simple general approach to inference about the tail of a distribution", 1975; the search for where the tail
begins is that of Clauset, Shalizi and Newman, "Power-law distributions in empirical data", 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
EPS = 1e-8  # under logarithms and in denominators, as in the reference code
_ROWS = 32  # candidates for xmin compared at a time: so many rows of a spectrum stay in cache


@dataclass(frozen=True)
class Tail:
    """A fitted tail.

    Attributes:
        alpha: exponent of the density.
        distance: Kolmogorov-Smirnov distance between the tail and the fit (D).
        start: index of xmin in the ascending spectrum.
    """

    alpha: float
    distance: float
    start: int


def median_tail(eigs: Floats, xmin_position: int = 2) -> Tail:
    """The tail that begins at the middle of the spectrum, or at 1/xmin_position of it.

    alpha = 1 + n / Σ_(j ≥ i) ln(λ_j / λ_i) with i = N // xmin_position and n = N - i: the smallest value counts, as in
    TempBalance and AlphaPruning. On Pareto samples alpha - 1 is therefore too large by the factor n / (n - 2), on
    average, with a relative spread of 1 / sqrt(n - 3).

    Args:
        eigs: (N,) ascending, N ≥ 1.
        xmin_position: the tail is the upper 1 - 1/xmin_position.
    """
    return _best(eigs, np.array([len(eigs) // xmin_position]))


def searched_tail(eigs: Floats) -> Tail:
    """The tail whose fit has the smallest Kolmogorov-Smirnov distance, over every eigenvalue but the last as xmin.

    Args:
        eigs: (N,) ascending, N ≥ 2.
    """
    return _best(eigs, np.arange(len(eigs) - 1))


def finger_tail(eigs: Floats, bins: int = 100, *, lower: str = "log") -> Tail:
    """The tail with the smallest distance among those that begin near the peak of the spectrum's logarithms.

    With x the left edge of the highest bin of the histogram of log10 λ, candidates are from a lower bound to 1.5 x.
    If no eigenvalue is in that range, the one nearest to x is taken.

    Args:
        eigs: (N,) ascending, N ≥ 2.
        bins: of the histogram.
        lower: "log" takes log10(0.95 x) as the lower bound, as WeightWatcher, AlphaPruning and TempBalance do, which
            is below every eigenvalue where x < 1.05; "linear" takes 0.95 x.
    """
    counts, edges = np.histogram(np.log10(eigs + EPS), bins=bins)
    peak = float(10 ** edges[counts.argmax()])
    least = np.log10(0.95 * peak) if lower == "log" else 0.95 * peak
    candidates = np.flatnonzero((eigs[:-1] >= least) & (eigs[:-1] <= 1.5 * peak))
    if not len(candidates):
        candidates = np.array([np.abs(eigs[:-1] - peak).argmin()])
    return _best(eigs, candidates)


def _best(eigs: Floats, starts: NDArray[np.intp]) -> Tail:
    """Of the tails that begin at `starts` (ascending) the first with the smallest distance."""
    n = len(eigs)
    logs = np.log(eigs + EPS)
    # Σ_(j ≥ i) (l_j - l_i) by the gaps between neighbours: all terms are positive, nothing cancels.
    gaps = np.diff(logs) * np.arange(n - 1, 0, -1)
    sums = np.append(np.cumsum(gaps[::-1])[::-1], 0.0)
    alphas = 1 + (n - starts) / (sums[starts] + EPS)
    distances = np.empty(len(starts))
    ranks = np.arange(n, dtype=np.float64)
    memory = np.empty(_ROWS * (n - starts[0]))
    for first in range(0, len(starts), _ROWS):
        rows = slice(first, first + _ROWS)
        low, begin, slopes = int(starts[first]), starts[rows, None], 1 - alphas[rows, None]
        d = memory[: len(begin) * (n - low)].reshape(len(begin), n - low)
        np.subtract(logs[low:], logs[begin], out=d)
        np.maximum(d, 0, out=d)  # before the row's own start: let nothing overflow, it is left out below
        np.multiply(d, slopes, out=d)
        np.exp(d, out=d)
        d += (ranks[low:] - begin) / (n - begin)
        d -= 1
        np.abs(d, out=d)
        d[ranks[low:] < begin] = 0
        distances[rows] = d.max(axis=1)
    best = int(distances.argmin())
    return Tail(float(alphas[best]), float(distances[best]), int(starts[best]))

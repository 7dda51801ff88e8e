"""Numbers that say what a spectrum is like: s (r,) float64, descending and not negative."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
EPS32 = torch.finfo(torch.float32).eps


def nonzero(s: Floats) -> Floats:
    """The singular values above r ε s_1, ε of float32: below it they are the rounding of the others."""
    return s[s > len(s) * EPS32 * s[0]] if len(s) else s


def median(values: Floats) -> float:
    """Of numbers in order; of twelve thousand spectra np.median takes longer than the spectra themselves."""
    return float(values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def spike_limit(s: Floats, multiple: float) -> float:
    """`multiple` times the median of the singular values that are not zero; infinite where all are."""
    values = nonzero(s)
    return multiple * median(values) if len(values) else np.inf


def tails(s: Floats) -> Floats:
    """(r + 1,) what is lost of Σ s² if the first k are kept, k = 0 to r; summed from the smallest."""
    return np.append(np.cumsum(np.square(s[::-1]))[::-1], 0.0)


def rank_within(s: Floats, share: float) -> int:
    """The fewest directions without which at most this share of Σ s² is lost, but one at least."""
    lost = tails(s)
    return max(1, int(np.argmax(lost <= share * lost[0])))


def effective_rank(s: Floats) -> float:
    """How many directions the update spreads over: exp of the entropy of s / Σ s; 0 for the zero update.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    values = nonzero(s)
    if not len(values):
        return 0.0
    p = values / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def channel_energy(b: Tensor, a: Tensor) -> Tensor:
    """‖b_k a_k‖_F² = ‖b_k‖² ‖a_k‖² of every channel of B (m, r) and A (r, n), as (r,) float64 on the CPU."""
    return energy(b, 0) * energy(a, 1)


def energy(factor: Tensor, dim: int) -> Tensor:
    """The squared norms of a factor's columns (dim 0) or rows (dim 1), float64 on the CPU."""
    norms: Tensor = torch.linalg.vector_norm(factor.detach(), dim=dim, dtype=torch.float64)
    return norms.square().cpu()

"""How certain a calibration is: standard errors, a bootstrap of the choice of directions, and agreement of choices.

g_k = Σ_i c_ik is a sum over calibration samples, so all that follows needs only the (n, r) parts c of each module.
"Choice" is what `AbsSelect` makes of g: core, the directions with the largest |g|, and noise, those with the smallest.

All functions take the samples for independent draws from one population. Two things bend that a little: samples of a
nominal batch share its number of labels, and the samples of a last, smaller batch weigh more than the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_fast.policies import AbsSelect

CERTAIN, SIGNIFICANT = 0.95, 0.05
DEFAULT = AbsSelect()
Samples = Mapping[str, Tensor]  # module name -> (n, r), the same n for all, r of each module


def standard_error(samples: Tensor) -> Tensor:
    """Standard error of g = Σ_i c_i: sqrt(n / (n − 1) · Σ_i (c_i − mean c)²).

    Args:
        samples: (n, r) c, the part of each sample in g, any real dtype.

    Returns:
        (r,) float64; NaN for a single sample, which says nothing about how much samples differ.

    Source: n² times the variance of a mean of n independent draws.
    """
    n, parts = len(samples), samples.double()
    spread = (parts - parts.mean(0)).square().sum(0)
    return (n / (n - 1) * spread).sqrt() if n > 1 else torch.full_like(spread, torch.nan)


class Membership(NamedTuple):
    """Probability of each direction to be core, and to be noise; both (r,) float64."""

    core: Tensor
    noise: Tensor


def bootstrap(
    samples: Samples, choice: AbsSelect = DEFAULT, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Membership]:
    """In what share of resampled calibrations each direction is chosen as core, and as noise.

    A resampled calibration is n − 1 draws with replacement from the n samples, the same draws for all modules. With one
    draw less than usual the spread of g relative to its mean is that of `standard_error`, without the factor
    (n − 1) / n that is far off for few samples.

    The shares are honest where g stands out of its standard error, and too sure of core directions where it does not:
    the largest |g| of many noisy ones owe some of their size to luck, which no resampling takes away. For noise it is
    the other way round: resampling adds a second portion of noise to |g|, so that it is seldom near zero.

    Args:
        samples: module name -> (n, r) part of each sample in g.
        choice: fractions of core and noise; by default those of `abs_select`.
        resamples: how many; the standard error of a share p is sqrt(p (1 − p) / resamples).
        seed: of the draws.

    Returns:
        module name -> shares; NaN if there is a single sample.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; n − 1 draws: Rao and Wu, JASA 83 (1988) 231.
    """
    n = _count(samples)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (resamples, n - 1), generator=generator)
    counts = torch.zeros(resamples, n, dtype=torch.float64)
    counts.scatter_add_(1, draws, torch.ones((), dtype=torch.float64).expand_as(draws))
    found: dict[str, Membership] = {}
    for names, parts in _stacks(samples, resamples):
        core, noise = (mask.mean(1, dtype=torch.float64) for mask in choice.choose(counts @ parts))
        found |= {name: Membership(*shares) for name, *shares in zip(names, core, noise, strict=True)}
    if n == 1:
        return {name: Membership(*(torch.full_like(share, torch.nan) for share in found[name])) for name in samples}
    return {name: found[name] for name in samples}


@dataclass(frozen=True)
class Agreement:
    """Shares of the chosen directions that two calibrations have in common.

    By chance means: the mean over random signs given to the samples, each for all modules and directions at once. If g
    is no more than noise around zero, that changes nothing, so there is signal in the choice only as far as agreement
    exceeds it. It is above k/r where |g| is larger in some directions whatever the signs, also because of a signal.

    Attributes:
        samples: m, how many samples from the first on are looked at.
        doubling: the first ⌊m/2⌋ against the first m: did doubling change the choice? The larger set contains the
            smaller, so this is high even by chance (0.38 for r = 64 and fractions of 0.2); what it tells is whether
            more samples still change what an edit does.
        doubling_by_chance: the same by chance.
        halves: two random halves of the first m, ⌊m/2⌋ samples each; the mean over several such splits. They share
            nothing, so this tells how well a calibration of half the size can be repeated: the honest measure.
        halves_by_chance: the same by chance.
        whole: the first m against all n samples. Like `doubling` it is flattered by what both have in common, and is 1
            for m = n by definition.
    """

    samples: int
    doubling: float
    doubling_by_chance: float
    halves: float
    halves_by_chance: float
    whole: float


def agreement(
    samples: Samples,
    choice: AbsSelect = DEFAULT,
    *,
    sizes: Sequence[int] | None = None,
    splits: int = 20,
    seed: int = 0,
) -> list[Agreement]:
    """How the choice of directions settles as samples are added.

    Two choices agree in (Σ |core ∩ core'| + Σ |noise ∩ noise'|) / (Σ k_core + Σ k_noise), sums over modules.

    Args:
        samples: module name -> (n, r) part of each sample in g.
        choice: fractions of core and noise; by default those of `abs_select`.
        sizes: the m to look at, each between 2 and n; by default n, n/√2, n/2, … down to 4, as
            signs make no difference to a half that is a single sample.
        splits: random halvings, and random signs, per m.
        seed: of both.

    Returns:
        One entry per size, in their order; none by default for fewer than 2 samples.

    Raises:
        ValueError: a size below 2 or above n.
    """
    n = _count(samples)
    sizes = _geometric(n) if sizes is None else sizes
    if wrong := [m for m in sizes if not 2 <= m <= n]:
        raise ValueError(f"agreement wants sizes from 2 to the {n} samples that there are; got {wrong[0]}")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (splits, n), generator=generator).double() * 2 - 1
    found = []
    for m in sizes:
        half, first, every = (torch.arange(n) < end for end in (m // 2, m, n))
        order = torch.rand(splits, m, generator=generator).argsort(1)
        one, other = torch.zeros(2, splits, n, dtype=torch.float64)
        one.scatter_(1, order[:, : m // 2], 1.0)
        other.scatter_(1, order[:, m // 2 : 2 * (m // 2)], 1.0)
        pairs = {
            "doubling": (half[None], first[None]),
            "doubling_by_chance": (signs * half, signs * first),
            "halves": (one, other),
            "halves_by_chance": (signs * one, signs * other),
            "whole": (first[None], every[None]),
        }
        one, other = (torch.cat([pair[side].double() for pair in pairs.values()]) for side in (0, 1))
        rows = iter(_overlap(samples, choice, one, other).tolist())
        shares = {name: list(islice(rows, len(pair[0]))) for name, pair in pairs.items()}
        found.append(Agreement(m, **{name: sum(share) / len(share) for name, share in shares.items()}))
    return found


def doubling(samples: Samples, choice: AbsSelect = DEFAULT) -> float:
    """`Agreement.doubling` of all n samples alone: the first ⌊n/2⌋ against all. NaN for a single one."""
    n = _count(samples)
    ones = torch.ones(1, n, dtype=torch.float64)
    return _overlap(samples, choice, ones * (torch.arange(n) < n // 2), ones).item() if n > 1 else float("nan")


def signal(samples: Samples, *, draws: int = 999, seed: int = 0) -> float:
    """P-value of the hypothesis that all g are noise around zero: that each sample could as well have the other sign.

    An exact randomisation test by Σ_k g_k² / Σ_i c_ik², summed over modules, among random signs of the samples. On data
    that the adapter was trained on until its loss was flat it is often large: then whatever is chosen is luck.

    Args:
        samples: module name -> (n, r) part of each sample in g.
        draws: of the signs of all samples; p is at least 1 / (draws + 1).
        seed: of the draws.

    Returns:
        The p-value, in (0, 1]; 1 for a single sample.

    Source: Fisher, "The Design of Experiments", 1935, section 21.
    """
    n = _count(samples)
    signs = torch.randint(2, (draws, n), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    signs = torch.cat([torch.ones(1, n, dtype=torch.float64), signs])
    found = torch.zeros(len(signs), dtype=torch.float64)
    for _, parts in _stacks(samples, len(signs)):
        largest = parts.abs().amax(1, keepdim=True)
        parts = parts / torch.where(largest > 0, largest, 1.0)  # squares stay in range
        total = parts.square().sum(1, keepdim=True)
        found += ((signs @ parts).square() / torch.where(total > 0, total, 1.0)).sum((0, 2))
    as_large = found >= found[0] * (1 - 1e-9)  # equal up to rounding is as large
    return as_large.double().mean().item()


def _overlap(samples: Samples, choice: AbsSelect, first: Tensor, second: Tensor) -> Tensor:
    """Agreement of the choices by g = first @ c and by g = second @ c, per row of these (W, n) weights. (W,)."""
    common, total = torch.zeros(len(first), dtype=torch.float64), 0
    for _, parts in _stacks(samples, len(first)):
        one, other = (choice.choose(weights @ parts) for weights in (first, second))
        for mine, its in zip(one, other, strict=True):
            common += (mine & its).sum((0, 2))
            total += int(mine[:, 0].sum())
    return common / total if total else torch.ones_like(common)


def _stacks(samples: Samples, rows: int) -> Iterator[tuple[list[str], Tensor]]:
    """Names and (modules, n, r) float64 of modules of one rank, as many as give a million numbers for so many `rows`.

    Fewer at a time, and threads that wait for each other take longer than the work.
    """
    by_rank = sorted(samples, key=lambda name: samples[name].shape[1])
    for r, group in groupby(by_rank, key=lambda name: samples[name].shape[1]):
        names, size = list(group), max(1, 2**20 // (rows * max(r, 1)))
        for start in range(0, len(names), size):
            some = names[start : start + size]
            yield some, torch.stack([samples[name] for name in some]).double()


def _geometric(n: int) -> list[int]:
    """n, n/√2, n/2, … down to 4, ascending; n alone if it is 2 or 3."""
    sizes = {round(n * 2 ** (-j / 2)) for j in range(2 * n.bit_length())}
    return sorted(m for m in sizes if m >= min(max(n, 2), 4))


def _count(samples: Samples) -> int:
    counts = {len(parts) for parts in samples.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every module needs its part of the same samples, at least one; got {sorted(counts)} samples")
    return counts.pop()


@dataclass(frozen=True)
class Stability:
    """All of the above for one calibration, as the report and `probe` show it.

    Attributes:
        samples: module name -> (n, r) part of each sample in g.
        choice: fractions of core and noise.
        membership: the bootstrap's probabilities by module.
        agreement: by number of samples, ascending.
    """

    samples: Samples
    choice: AbsSelect
    membership: Mapping[str, Membership]
    agreement: Sequence[Agreement]

    @classmethod
    def of(cls, samples: Samples, choice: AbsSelect = DEFAULT) -> Stability:
        """The stability of the choice on these samples."""
        return cls(samples, choice, bootstrap(samples, choice), agreement(samples, choice))

    def certain(self) -> tuple[float | None, float | None]:
        """Shares of the chosen core and of the chosen noise directions whose probability is above 0.95.

        None where nothing is chosen or there is a single sample.
        """
        found: list[list[float]] = [[], []]
        for name, parts in self.samples.items():
            chosen = self.choice.choose(parts.double().sum(0))
            for shares, mask, probability in zip(found, chosen, self.membership[name], strict=True):
                shares += probability[mask].tolist()
        core, noise = (
            sum(p > CERTAIN for p in shares) / len(shares) if shares and _count(self.samples) > 1 else None
            for shares in found
        )
        return core, noise

    def summary(self) -> dict[str, Any]:
        """The numbers for a record; JSON-serialisable."""
        core, noise = self.certain()
        return {
            "samples": _count(self.samples),
            "core_frac": self.choice.core_frac,
            "noise_frac": self.choice.noise_frac,
            "core_certain": core,
            "noise_certain": noise,
            "signal_p": signal(self.samples),
            "agreement": [asdict(entry) for entry in self.agreement],
        }


def as_text(summary: Mapping[str, Any]) -> str:
    """What `Stability.summary` says, for people: a line, and perhaps a warning on another."""
    if not summary["agreement"]:
        return "a single sample says nothing about how certain the choice of directions is"
    parts = [
        f"{role} directions certain (bootstrap > {CERTAIN}): {summary[f'{role}_certain']:.0%}"
        for role in ("core", "noise")
        if summary[f"{role}_certain"] is not None
    ]
    last = summary["agreement"][-1]
    parts.append(
        f"doubling the samples to {last['samples']} changed {1 - last['doubling']:.0%} of the choice (without any "
        f"signal: {1 - last['doubling_by_chance']:.0%})"
    )
    text, p = "; ".join(parts), summary["signal_p"]
    if p > SIGNIFICANT:
        text += f"\nwarning: these samples do not show that g is anything but noise around zero (p = {p:.2g})"
    return text

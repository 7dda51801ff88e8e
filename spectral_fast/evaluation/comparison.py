"""Two models on the same problems: is one better, and by how much? And many against one: which of them still are?"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
_DRAWS = 20_000
_FINEST = 1000  # programs per problem up to which a sign-flip test is exact
EXACT, SIGNS = "exact McNemar", "sign flips of the paired differences"
NEWCOMBE, NORMAL = "Newcombe 1998, method 10", "normal, from the paired differences"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of the accuracies of a baseline and an edit, as fractions.

    Attributes:
        n: problems.
        baseline, edited: accuracies.
        baseline_standard_error, edited_standard_error: of each, see `standard_error`.
        difference: edited - baseline.
        interval: 95 % confidence interval of the difference.
        only_baseline, only_edited: problems that only this one answers correctly, or more often.
        p_value: two-sided, by `test`.
        verdict: in words.
        interval_method, test: what interval and p-value were computed by.
    """

    n: int
    baseline: float
    edited: float
    baseline_standard_error: float
    edited_standard_error: float
    difference: float
    interval: tuple[float, float]
    only_baseline: int
    only_edited: int
    p_value: float
    verdict: str
    interval_method: str = NEWCOMBE
    test: str = EXACT

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with the confidence."""
        return {**asdict(self), "interval": list(self.interval), "confidence": CONFIDENCE}


def compare(baseline: Mapping[Key, float], edited: Mapping[Key, float]) -> Comparison:
    """Compare two models by how each does on every problem.

    Where every problem is either solved or not, the interval is Newcombe's and the test McNemar's, exact. Where a
    problem has several answers and so a share of correct ones, both come from the paired differences: a normal
    interval of their mean (of a single problem, which has no spread, all that is possible), and a sign-flip test.

    Args:
        baseline: problem -> correct, or the share of its answers that are, 0 to 1.
        edited: the same, for the same problems.

    Raises:
        ValueError: there are no problems, they are not the same ones, or a share is not within [0, 1].

    Example:
        >>> from spectral_fast.evaluation import compare
        >>> before, after = dict.fromkeys(range(100), False), {i: i < 8 for i in range(100)}  # 8 of 100 are now right
        >>> comparison = compare(before, after)
        >>> comparison.difference, round(comparison.p_value, 4)
        (0.08, 0.0078)
    """
    differing = baseline.keys() ^ edited.keys()
    if differing:
        example = next(iter(differing))
        missing = "edited" if example in baseline else "baseline"
        raise ValueError(
            f"a paired comparison needs the same problems: {len(differing)} are on one side only, e.g. {example!r}, "
            f"which the {missing} results lack"
        )
    if not baseline:
        raise ValueError("a comparison needs at least one problem; got none")
    first = np.array([float(baseline[key]) for key in baseline])
    second = np.array([float(edited[key]) for key in baseline])
    for values in (first, second):
        if not ((values >= 0) & (values <= 1)).all():  # False for NaN, too
            raise ValueError(f"a share of correct answers lies in [0, 1]; got {values.min():g} to {values.max():g}")
    n, only_b, only_e = len(first), int((first > second).sum()), int((second > first).sum())
    if np.isin(np.concatenate([first, second]), (0, 1)).all():
        both = int((first * second).sum())
        interval = newcombe_interval(both, only_e, only_b, n - both - only_e - only_b)
        p_value, difference, methods = mcnemar_exact(only_b, only_e), (only_e - only_b) / n, (NEWCOMBE, EXACT)
    else:
        differences = second - first
        difference, half = float(differences.mean()), 2.0
        if n > 1:
            half = _Z * float(differences.std(ddof=1)) / math.sqrt(n)
        interval = max(difference - half, -1.0), min(difference + half, 1.0)
        p_value, methods = sign_flip_test(differences), (NORMAL, SIGNS)
    return Comparison(
        n=n,
        baseline=float(first.mean()),
        edited=float(second.mean()),
        baseline_standard_error=spread_of_mean(first),
        edited_standard_error=spread_of_mean(second),
        difference=difference,
        interval=interval,
        only_baseline=only_b,
        only_edited=only_e,
        p_value=p_value,
        verdict=_verdict(difference, p_value),
        interval_method=methods[0],
        test=methods[1],
    )


def standard_error(accuracy: float, n: int) -> float:
    """sqrt(p (1 - p) / n), the standard error of an accuracy p over n problems."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def spread_of_mean(scores: Sequence[float] | np.ndarray[Any, Any]) -> float:
    """sqrt(mean (x - mean x)² / n), the standard error of a mean score: `standard_error` where each is 0 or 1."""
    return float(np.std(scores)) / math.sqrt(len(scores))


def sign_flip_test(differences: Sequence[float] | np.ndarray[Any, Any]) -> float:
    """Two-sided p-value of a sum of paired differences among the sums with any signs.

    Exact, over all signs, if the differences are whole numbers of 1/N for an N of at most 1000, as shares of N
    answers are. Else (1 + hits) / (1 + draws) of 20,000 draws with a fixed seed: the same differences always give
    the same value, never below 5e-5.

    Source: Fisher's randomisation test; Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9 (2010) 39, for the 1 +.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]
    if not len(d):
        return 1.0
    for finest in range(1, _FINEST + 1):
        units = np.rint(d * finest)
        if (np.abs(d * finest - units) < 1e-6).all():
            return _all_signs(units.astype(int).tolist())
    rng, hits, rows = np.random.default_rng(0), 0, max(1, 2**20 // len(d))
    bound = abs(d.sum()) * (1 - 1e-12)  # sums that are equal but for rounding count
    for start in range(0, _DRAWS, rows):
        signs = rng.integers(0, 2, (min(rows, _DRAWS - start), len(d)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ d) >= bound).sum())
    return (1 + hits) / (1 + _DRAWS)


def _all_signs(units: Sequence[int]) -> float:
    """Share of the sums ± units[0] ± units[1] … that are at least as far from 0 as that with the signs given."""
    largest, bound = sum(map(abs, units)), abs(sum(units))
    chances = np.zeros(2 * largest + 1)  # of the sums from -largest to largest
    chances[largest] = 1.0
    for unit in units:
        chances = (np.roll(chances, unit) + np.roll(chances, -unit)) / 2  # what rolls over an end is 0
    far = chances[: largest - bound + 1].sum() + chances[largest + bound :].sum()
    return min(1.0, float(far))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the k-th smallest of m times (m - k + 1), never below a smaller one's, at most 1.

    Rejecting where they are below 0.05 keeps the chance of even one wrong rejection among all m at 5 %.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979) 65.
    """
    m, largest, adjusted = len(p_values), 0.0, [1.0] * len(p_values)
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Yardstick:
    """What random edits of the same size do to the accuracy: differences to the original, as fractions, ascending."""

    differences: tuple[float, ...]

    @classmethod
    def of(cls, differences: Sequence[float]) -> Yardstick:
        """From the controls' differences, in any order."""
        return cls(tuple(sorted(differences)))

    def summary(self) -> dict[str, Any]:
        """Count, mean, sample standard deviation (None of fewer than two) and extremes."""
        d = self.differences
        return {
            "controls": len(d),
            "mean": sum(d) / len(d),
            "standard_deviation": float(np.std(d, ddof=1)) if len(d) > 1 else None,
            "lowest": d[0],
            "highest": d[-1],
        }

    def place(self, difference: float) -> dict[str, Any]:
        """Where a variant's difference lies among them.

        Returns:
            {"above": controls that it exceeds, "p_value": (1 + controls at least as good) / (1 + controls), "verdict"}.
            With 5 controls no p-value is below 0.17: they say what is ordinary, not what is significant.
        """
        n, above = len(self.differences), sum(d < difference for d in self.differences)
        if above == n:
            words = f"above all {n} random controls"
        elif difference < self.differences[0]:
            words = f"below all {n} random controls"
        else:
            words = f"within the {n} random controls"
        return {"above": above, "p_value": (1 + n - above) / (1 + n), "verdict": words}


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p-value of b against c discordant pairs: twice the smaller tail of a binomial(b + c, 1/2), at most 1.

    Source: McNemar, Psychometrika 12 (1947) 153, with the exact distribution in place of chi-squared.
    """
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / (1 << n))  # Python divides integers of any size correctly


def newcombe_interval(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """95 % confidence interval of the difference of paired proportions, (a + b) / n - (a + c) / n.

    Wilson's intervals of the two proportions, squared and added with their correlation phi: difference -
    sqrt(l1² - 2 phi l1 u2 + u2²), and alike above, where l and u are the distances to the two limits. It
    stays within [-1, 1], and is honest where few pairs are discordant, which the usual Wald interval is
    not.

    Args:
        a: pairs in which both are correct.
        b: only the first is.
        c: only the second is.
        d: neither is.

    Source: Newcombe, "Improved confidence intervals for the difference between binomial proportions based
        on paired data", Statistics in Medicine 17 (1998) 2635, method 10.
    """
    n = a + b + c + d
    (low1, high1), (low2, high2) = _wilson(a + b, n), _wilson(a + c, n)
    p1, p2 = (a + b) / n, (a + c) / n
    product = (a + b) * (c + d) * (a + c) * (b + d)
    covariance = float(a * d - b * c)
    if covariance > 0:  # the method's continuity correction
        covariance = max(covariance - n / 2, 0.0)
    phi = covariance / math.sqrt(product) if product else 0.0
    l1, u1, l2, u2 = p1 - low1, high1 - p1, p2 - low2, high2 - p2
    below = math.sqrt(max(l1 * l1 - 2 * phi * l1 * u2 + u2 * u2, 0.0))
    above = math.sqrt(max(u1 * u1 - 2 * phi * u1 * l2 + l2 * l2, 0.0))
    difference = (b - c) / n
    return difference - below, difference + above


def _wilson(successes: int, n: int) -> tuple[float, float]:
    p, z2 = successes / n, _Z * _Z
    middle = p + z2 / (2 * n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def _verdict(gain: float, p_value: float) -> str:
    if p_value >= SIGNIFICANCE:
        return f"not distinguishable (p = {p_value:.3g})"
    return f"edited is {'better' if gain > 0 else 'worse'} (p = {p_value:.3g})"

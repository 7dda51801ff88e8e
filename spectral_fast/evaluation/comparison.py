"""Two models on the same problems: is one better, and by how much? Nothing but exact counts and closed forms."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of the accuracies of a baseline and an edit, as fractions.

    Attributes:
        n: problems.
        baseline, edited: accuracies.
        baseline_standard_error, edited_standard_error: sqrt(p (1 - p) / n) of each.
        difference: edited - baseline.
        interval: 95 % confidence interval of the difference.
        only_baseline, only_edited: problems that only this one answers correctly.
        p_value: exact two-sided McNemar test.
        verdict: in words.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with the names of the methods."""
        methods = {"confidence": CONFIDENCE, "interval_method": "Newcombe 1998, method 10", "test": "exact McNemar"}
        return {**asdict(self), "interval": list(self.interval), **methods}


def compare(baseline: Mapping[Key, bool], edited: Mapping[Key, bool]) -> Comparison:
    """Compare two models by which problems each answers correctly.

    Args:
        baseline: problem -> correct.
        edited: problem -> correct, for the same problems.

    Raises:
        ValueError: there are no problems, or they are not the same ones.
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
    counts = {(b, e): 0 for b in (True, False) for e in (True, False)}
    for key, correct in baseline.items():
        counts[bool(correct), bool(edited[key])] += 1
    both, only_b, only_e, neither = (counts[k] for k in ((True, True), (True, False), (False, True), (False, False)))
    n, p_value = len(baseline), mcnemar_exact(only_b, only_e)
    p_baseline, p_edited = (both + only_b) / n, (both + only_e) / n
    return Comparison(
        n=n,
        baseline=p_baseline,
        edited=p_edited,
        baseline_standard_error=standard_error(p_baseline, n),
        edited_standard_error=standard_error(p_edited, n),
        difference=(only_e - only_b) / n,
        interval=newcombe_interval(both, only_e, only_b, neither),
        only_baseline=only_b,
        only_edited=only_e,
        p_value=p_value,
        verdict=_verdict(only_e - only_b, p_value),
    )


def standard_error(accuracy: float, n: int) -> float:
    """sqrt(p (1 - p) / n), the standard error of an accuracy p over n problems."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


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


def _verdict(gain: int, p_value: float) -> str:
    if p_value >= SIGNIFICANCE:
        return f"not distinguishable (p = {p_value:.3g})"
    return f"edited is {'better' if gain > 0 else 'worse'} (p = {p_value:.3g})"

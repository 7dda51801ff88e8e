"""Tail exponents: against their definitions, and on Pareto samples whose exponent is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from spectral_fast.allocation.tail import EPS, Floats, Tail, finger_tail, median_tail, searched_tail

SAMPLES, VALUES = 200, 600


def pareto(alpha: float, size: int, rng: np.random.Generator) -> Floats:
    """Values above 1 with density (alpha - 1) x^(-alpha), ascending."""
    found: Floats = np.sort(rng.uniform(size=size) ** (-1 / (alpha - 1)))
    return found


def plainly(eigs: Floats, starts: list[int]) -> Tail:
    """The definition, one start and one value at a time."""
    best = Tail(0.0, np.inf, 0)
    for i in starts:
        n = len(eigs) - i
        logs = [np.log(eigs[j] + EPS) - np.log(eigs[i] + EPS) for j in range(i, len(eigs))]
        alpha = 1 + n / (sum(logs) + EPS)
        distance = max(abs(1 - np.exp((1 - alpha) * log) - j / n) for j, log in enumerate(logs))
        if distance < best.distance:
            best = Tail(float(alpha), float(distance), i)
    return best


def random_spectrum(rng: np.random.Generator) -> Floats:
    w = rng.normal(size=(90, 61)) * rng.pareto(3, size=61)
    found: Floats = np.linalg.svd(w, compute_uv=False)[::-1] ** 2
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_the_one_over_every_start(seed: int) -> None:
    eigs = random_spectrum(np.random.default_rng(seed))
    found, expected = searched_tail(eigs), plainly(eigs, list(range(len(eigs) - 1)))
    assert found.start == expected.start
    assert (found.alpha, found.distance) == pytest.approx((expected.alpha, expected.distance), rel=1e-12)


def test_the_search_needs_no_more_than_one_block_or_many() -> None:
    for size in (2, 3, 31, 32, 33, 64, 65, 100):
        eigs = pareto(2.5, size, np.random.default_rng(size))
        expected = plainly(eigs, list(range(size - 1)))
        assert searched_tail(eigs).alpha == pytest.approx(expected.alpha, rel=1e-12)


@pytest.mark.parametrize("lower", ["log", "linear"])
def test_fix_finger_searches_near_the_peak_of_the_histogram(lower: str) -> None:
    eigs = random_spectrum(np.random.default_rng(7))
    counts, edges = np.histogram(np.log10(eigs + EPS), bins=30)
    x = 10 ** edges[int(np.argmax(counts))]
    least = np.log10(0.95 * x) if lower == "log" else 0.95 * x
    starts = [i for i in range(len(eigs) - 1) if least <= eigs[i] <= 1.5 * x]
    assert finger_tail(eigs, 30, lower=lower).alpha == pytest.approx(plainly(eigs, starts).alpha, rel=1e-12)


def test_fix_finger_takes_the_nearest_eigenvalue_where_none_is_in_range() -> None:
    for second, nearest in ((9.0, 0), (0.2, 1)):
        eigs = np.array([1e-3, second, 10.0, 11.0, 12.0])
        edge = 10 ** np.histogram(np.log10(eigs), bins=2)[1][1]  # of the second bin, the fuller one
        assert not ((eigs >= 0.95 * edge) & (eigs <= 1.5 * edge)).any()
        assert finger_tail(eigs, 2, lower="linear").start == nearest == np.abs(eigs - edge).argmin()


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_median_hill_has_the_bias_and_spread_that_theory_gives(alpha: float) -> None:
    # Of n values of which the smallest is xmin, n - 1 exceed it, with exponential logarithms: alpha - 1 is estimated by
    # n / Gamma(n - 1), whose mean is n / (n - 2) and whose deviation n / ((n - 2) sqrt(n - 3)), times the true one.
    rng = np.random.default_rng(0)
    n = VALUES - VALUES // 2
    found = np.array([median_tail(pareto(alpha, VALUES, rng)).alpha - 1 for _ in range(SAMPLES)]) / (alpha - 1)
    mean, spread = n / (n - 2), n / ((n - 2) * np.sqrt(n - 3))
    assert abs(found.mean() - mean) < 5 * spread / np.sqrt(SAMPLES)
    assert abs(found.std(ddof=1) / spread - 1) < 5 * np.sqrt(1 / (2 * SAMPLES))


@pytest.mark.parametrize("estimator", [searched_tail, finger_tail])
@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_searched_tails_are_near_the_exponent_of_pareto_samples(
    estimator: Callable[[Floats], Tail], alpha: float
) -> None:
    # A search may take any tail, so its spread is that of the tails that it takes, and its bias part of that.
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(50):
        eigs = pareto(alpha, VALUES, rng)
        tail = estimator(eigs)
        errors.append((tail.alpha - alpha) / ((alpha - 1) / np.sqrt(VALUES - tail.start)))
    assert np.max(np.abs(errors)) < 5
    assert abs(np.mean(errors)) < 1


def test_the_search_finds_where_a_power_law_begins() -> None:
    rng = np.random.default_rng(2)
    body, tail = rng.uniform(0.01, 1, size=800), pareto(3.0, 800, rng)
    found = searched_tail(np.sort(np.concatenate([body, tail])))
    assert abs(found.start - 800) < 150
    assert abs(found.alpha - 3) < 5 * 2 / np.sqrt(1600 - found.start)


def test_the_exponent_does_not_depend_on_the_scale() -> None:
    eigs = random_spectrum(np.random.default_rng(3))
    for estimator in (median_tail, searched_tail):
        assert estimator(1e4 * eigs).alpha == pytest.approx(estimator(eigs).alpha, rel=1e-5)  # but for EPS

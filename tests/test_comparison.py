"""Paired comparisons against published values, scipy and simulation."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from spectral_fast.evaluation.comparison import (
    Yardstick,
    compare,
    holm,
    mcnemar_exact,
    newcombe_interval,
    sign_flip_test,
    spread_of_mean,
    standard_error,
)


def outcomes(both: int, only_baseline: int, only_edited: int, neither: int) -> tuple[dict, dict]:
    pairs = [(1, 1)] * both + [(1, 0)] * only_baseline + [(0, 1)] * only_edited + [(0, 0)] * neither
    return {i: bool(b) for i, (b, _) in enumerate(pairs)}, {i: bool(e) for i, (_, e) in enumerate(pairs)}


def test_mcnemar_is_scipys_binomial_test() -> None:
    for b, c in [*itertools.product(range(12), repeat=2), (700, 619), (1319, 0), (0, 1319)]:
        expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
        assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9), (b, c)


def test_mcnemar_on_the_textbook_example() -> None:
    # Fagerland, Lydersen, Laake, "Recommended tests and confidence intervals for paired binomial proportions",
    # Statistics in Medicine 33 (2014): airway hyper-responsiveness before and after transplantation, 1 and 7
    # discordant pairs
    assert mcnemar_exact(1, 7) == 18 / 256
    assert mcnemar_exact(7, 1) == 18 / 256


def test_the_interval_on_the_textbook_example() -> None:
    # the same 21 pairs: 1 both, 1 only before, 7 only after, 12 neither; published as (-0.507, -0.026)
    low, high = newcombe_interval(1, 1, 7, 12)
    assert (round(low, 3), round(high, 3)) == (-0.507, -0.026)


def brute_interval(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """The same interval from scipy's Wilson limits, and the correlation from its definition on the pairs."""
    n = a + b + c + d
    first, second = (stats.binomtest(k, n).proportion_ci(method="wilson") for k in (a + b, a + c))
    x = np.repeat([1, 1, 0, 0], [a, b, c, d])
    y = np.repeat([1, 0, 1, 0], [a, b, c, d])
    phi = 0.0
    if x.std() and y.std():
        phi = np.corrcoef(x, y)[0, 1]
        if phi > 0:
            phi = max(phi - n / 2 / np.sqrt((a + b) * (c + d) * (a + c) * (b + d)), 0)
    p1, p2 = x.mean(), y.mean()
    down, up = (p1 - first.low, second.high - p2), (first.high - p1, p2 - second.low)
    return tuple(
        p1 - p2 + sign * np.sqrt(max(u * u - 2 * phi * u * v + v * v, 0)) for sign, (u, v) in ((-1, down), (1, up))
    )


def test_the_interval_agrees_with_one_built_from_scipy() -> None:
    rng = np.random.default_rng(0)
    tables = [rng.multinomial(n, rng.dirichlet([1, 0.5, 0.5, 1])) for n in (1, 2, 10, 164, 1319) for _ in range(30)]
    tables += [(0, 5, 0, 0), (5, 0, 0, 0), (0, 0, 0, 5), (3, 0, 0, 4), (900, 40, 60, 319)]
    for table in tables:
        a, b, c, d = map(int, table)
        low, high = newcombe_interval(a, b, c, d)
        assert (low, high) == pytest.approx(brute_interval(a, b, c, d), abs=1e-9), table
        assert -1 <= low <= (b - c) / (a + b + c + d) <= high <= 1
        assert newcombe_interval(a, c, b, d) == pytest.approx((-high, -low), abs=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, truth, n = np.random.default_rng(1), [0.5, 0.10, 0.06, 0.34], 164
    tables = rng.multinomial(n, truth, size=4000)
    intervals = [newcombe_interval(*map(int, table)) for table in tables]
    covered = np.mean([low <= truth[1] - truth[2] <= high for low, high in intervals])
    assert abs(covered - 0.95) < 0.015  # four standard errors of 4000 draws


def test_a_comparison_by_hand() -> None:
    result = compare(*outcomes(50, 5, 15, 30))
    assert (result.n, result.only_baseline, result.only_edited) == (100, 5, 15)
    assert (result.baseline, result.edited) == (0.55, 0.65)
    assert result.difference == pytest.approx(0.10)
    assert result.baseline_standard_error == pytest.approx(0.049749, abs=1e-6)
    assert result.edited_standard_error == pytest.approx(0.047697, abs=1e-6)
    assert result.p_value == pytest.approx(stats.binomtest(5, 20, 0.5).pvalue)
    assert result.interval == newcombe_interval(50, 15, 5, 30)
    assert result.interval[0] > 0
    assert result.verdict == "edited is better (p = 0.0414)"
    assert compare(*outcomes(50, 15, 5, 30)).verdict == "edited is worse (p = 0.0414)"


def test_what_is_within_noise_is_not_distinguishable() -> None:
    assert compare(*outcomes(800, 20, 31, 468)).verdict.startswith("not distinguishable (p = 0.16")
    same = compare(*outcomes(3, 0, 0, 4))
    assert (same.p_value, same.difference, same.verdict) == (1.0, 0.0, "not distinguishable (p = 1)")
    assert same.interval[0] < 0 < same.interval[1]


def test_pairs_are_matched_by_problem_and_not_by_order() -> None:
    baseline, edited = outcomes(2, 1, 4, 3)
    shuffled = dict(sorted(edited.items(), key=lambda item: -item[0]))
    assert compare(baseline, shuffled) == compare(baseline, edited)


def test_other_problems_and_no_problems_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 are on one side only, e.g. 'HumanEval/7', which the edited results lack"):
        compare({"HumanEval/7": True, "HumanEval/8": True}, {"HumanEval/8": True})
    with pytest.raises(ValueError, match=r"e.g. 2, which the baseline results lack"):
        compare({1: True}, {1: True, 2: False})
    with pytest.raises(ValueError, match="at least one problem"):
        compare({}, {})


def test_the_record_is_json_and_names_its_methods() -> None:
    record = json.loads(json.dumps(compare(*outcomes(5, 1, 2, 3)).to_dict(), allow_nan=False))
    assert record["confidence"] == 0.95
    assert "Newcombe" in record["interval_method"]
    assert record["test"] == "exact McNemar"
    assert len(record["interval"]) == 2


def test_the_standard_error_of_gsm8k_is_over_a_point() -> None:
    assert standard_error(0.6, 1319) == pytest.approx(0.0135, abs=1e-4)
    assert standard_error(0.0, 10) == standard_error(1.0, 10) == 0


def test_holm_by_hand_and_in_the_order_given() -> None:
    # Holm's own scheme: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, the last lifted to the one before
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_a_single_false_alarm() -> None:
    rng = np.random.default_rng(0)
    alarms = [min(holm(list(rng.uniform(size=20)))) < 0.05 for _ in range(4000)]
    assert np.mean(alarms) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 4000)
    assert np.mean(alarms) > 0.03  # and is no more careful than it must be: 1 - 0.9975^20 = 0.049


def test_shares_of_correct_answers_are_compared_by_their_differences() -> None:
    rng = np.random.default_rng(0)
    first = rng.binomial(50, 0.4, size=164) / 50
    second = np.clip(first + rng.integers(-4, 8, size=164) / 50, 0, 1)
    result = compare(dict(enumerate(first)), dict(enumerate(second)))
    d = second - first
    assert result.difference == pytest.approx(d.mean())
    assert result.interval == pytest.approx(stats.norm.interval(0.95, d.mean(), d.std(ddof=1) / np.sqrt(164)))
    assert result.p_value < 0.001
    assert result.verdict.startswith("edited is better")
    assert (result.only_baseline, result.only_edited) == ((d < 0).sum(), (d > 0).sum())
    assert (result.test, result.interval_method) != (compare({1: 1}, {1: 0}).test, "Newcombe 1998, method 10")
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        compare({1: 0.5}, {1: 1.5})
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        compare({1: float("nan")}, {1: 0.5})
    assert compare({1: 0.5}, {1: 0.5}).p_value == 1


def test_the_sign_flip_test_is_the_exact_one_within_its_draws() -> None:
    rng = np.random.default_rng(2)
    for shift in (0.0, 0.3, 1.0):
        d = rng.normal(shift, 1, size=12).round(1)
        signs = np.array(list(itertools.product((-1, 1), repeat=12)))
        exact = (np.abs(signs @ d) >= abs(d.sum()) - 1e-9).mean()
        assert sign_flip_test(d) == pytest.approx(exact, abs=1e-12)
        fine = d + rng.uniform(0, 1e-4, size=12)  # of no common unit, so by draws
        exact = (np.abs(signs @ fine) >= abs(fine.sum()) - 1e-12).mean()
        assert sign_flip_test(fine) == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)
        assert sign_flip_test(fine) == sign_flip_test(fine)
    assert sign_flip_test([0.0, 0.0]) == 1


def test_the_sign_flip_test_of_ones_is_mcnemars_and_has_no_floor() -> None:
    # 4080 variants of 164 problems with 50 programs each: Holm needs p-values below 0.05 / 4080
    for b, c in [(0, 1), (3, 9), (50, 60), (0, 164)]:
        assert sign_flip_test([-0.02] * b + [0.02] * c) == pytest.approx(mcnemar_exact(b, c), rel=1e-9)


def test_one_problem_with_shares_says_nothing() -> None:
    result = compare({1: 0.2}, {1: 0.8})
    assert result.interval == (-1, 1)
    assert result.p_value == 1


def test_the_standard_error_of_yes_and_no_is_the_one_of_an_accuracy() -> None:
    assert spread_of_mean([1, 0, 0, 1, 1]) == pytest.approx(standard_error(0.6, 5))
    assert spread_of_mean([0.5, 0.5]) == 0


def test_a_variant_has_a_place_among_the_random_controls() -> None:
    yardstick = Yardstick.of([0.02, -0.01, 0.0, 0.01, -0.02])
    assert yardstick.summary() == {
        "controls": 5,
        "mean": pytest.approx(0),
        "standard_deviation": pytest.approx(np.std([0.02, -0.01, 0, 0.01, -0.02], ddof=1)),
        "lowest": -0.02,
        "highest": 0.02,
    }
    assert yardstick.place(0.03) == {"above": 5, "p_value": 1 / 6, "verdict": "above all 5 random controls"}
    assert yardstick.place(0.02) == {"above": 4, "p_value": 2 / 6, "verdict": "within the 5 random controls"}
    assert yardstick.place(-0.02)["verdict"] == "within the 5 random controls"
    assert yardstick.place(-0.03) == {"above": 0, "p_value": 1.0, "verdict": "below all 5 random controls"}
    assert Yardstick.of([0.1]).summary()["standard_deviation"] is None

"""Bias and spread of the tail estimators on Pareto samples of known exponent: ``python -m benchmarks.tails``.

Relative to alpha - 1, in percent, over 400 samples per line. Theory says of the median estimator that its bias is
n / (n - 2) - 1 and its spread n / ((n - 2) sqrt(n - 3)), where n is half of the values.
"""

from __future__ import annotations

import numpy as np

from spectral_fast.allocation.tail import finger_tail, median_tail, searched_tail

ESTIMATORS = {"median": median_tail, "goodness-of-fit": searched_tail, "fix-finger": finger_tail}
SAMPLES = 400


def main() -> None:
    """Print the table."""
    print(
        "| values | alpha | " + " | ".join(f"{name}: bias ± spread, %" for name in ESTIMATORS) + " | theory (median) |"
    )
    print("|---" * (len(ESTIMATORS) + 3) + "|")
    for size in (384, 1024):
        for alpha in (2.0, 3.0, 4.0):
            rng = np.random.default_rng(0)
            samples = [np.sort(rng.uniform(size=size) ** (-1 / (alpha - 1))) for _ in range(SAMPLES)]
            cells = []
            for estimate in ESTIMATORS.values():
                found = 100 * (np.array([estimate(x).alpha for x in samples]) - alpha) / (alpha - 1)
                cells.append(f"{found.mean():+.1f} ± {found.std(ddof=1):.1f}")
            n = size - size // 2
            theory = f"{200 / (n - 2):+.1f} ± {100 * n / ((n - 2) * np.sqrt(n - 3)):.1f}"
            print(f"| {size} | {alpha:g} | " + " | ".join(cells) + f" | {theory} |", flush=True)


if __name__ == "__main__":
    main()

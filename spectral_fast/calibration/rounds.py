"""Calibration in rounds of samples, until more of them do not change the choice of directions any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_fast.statistics import doubling

FIRST = 8  # samples before the first check: earlier, two choices may agree by luck


def in_rounds(
    measure: Callable[[range], dict[str, Tensor]], count: int, batch_size: int, until_stable: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Measure samples until doubling them has left a share of the choice as it was, or all are measured.

    The choice is that of `abs_select` with its defaults, and what is compared `statistics.doubling`. With few
    directions, or a low share, a check may pass by luck; each is another chance to. It says that more samples would
    change little, not that the choice is right: see `statistics.Agreement`.

    Args:
        measure: g of each sample in a range of them, (samples, r) by module.
        count: how many samples there are.
        batch_size: samples per nominal batch; no round ends inside one.
        until_stable: the share, up to 1; 0 measures all samples in one round.

    Returns:
        g per sample by module, in order; and for the record `samples_used` and, if `until_stable`, `stable` and the
        `checks`, each of `samples` and `agreement`.
    """
    rows: dict[str, Tensor] = {}
    checks: list[dict[str, float]] = []
    used, stable = 0, False
    for part in _rounds(count, batch_size) if until_stable else [range(count)]:
        found = measure(part)
        rows = {name: torch.cat([rows[name], g]) for name, g in found.items()} if rows else found
        used = part.stop
        if until_stable and used > 1:
            checks.append({"samples": used, "agreement": doubling(rows)})
            stable = checks[-1]["agreement"] >= until_stable
        if stable:
            break
    return rows, {"samples_used": used} | ({"stable": stable, "checks": checks} if until_stable else {})


def as_text(record: Mapping[str, Any]) -> str:
    """One line for people about what `in_rounds` tells, and about the share that was wanted, `until_stable`."""
    used, wanted = record["samples_used"], record["until_stable"]
    if not record["checks"]:
        return f"warning: {used} sample cannot show whether the choice is stable; give more"
    kept = f"doubling them left {record['checks'][-1]['agreement']:.1%} of the choice as it was, {wanted:.1%} wanted"
    if record["stable"]:
        return f"stable after {used} samples: {kept}"
    return f"warning: not stable with all {used} samples: {kept}; give more samples, or a lower --until_stable"


def _rounds(count: int, batch_size: int) -> Iterator[range]:
    """Whole nominal batches: at least 8 samples, then a quarter of what there is, rounded up."""
    start, end = 0, _whole(FIRST, batch_size)
    while start < count:
        yield range(start, min(end, count))
        start, end = end, end + _whole(-(-end // 4), batch_size)


def _whole(samples: int, batch_size: int) -> int:
    """The next multiple of the batch size."""
    return -(-samples // batch_size) * batch_size

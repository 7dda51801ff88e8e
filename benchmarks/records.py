"""What was measured, and the rows of ``results/<machine>.csv``. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import KAPPAS, Adapter, Cores, Task


@dataclass(frozen=True)
class Measurement:
    """Repeats of one implementation.

    Attributes:
        implementation: its name.
        threads: how many it used.
        seconds: of each repeat, for the whole case.
        extrapolated: whether they were measured on a part, one module or layer, and multiplied.
        peak_bytes: peak resident set of a command; None for what is timed inside a process.
        saved_bytes: what autograd keeps for the backward pass, weights apart; None where nobody counted.
        read_bytes: weights that were read from disk; None where nobody counted.
        error: largest difference of its tail exponents to ours; None where there are none.
    """

    implementation: str
    threads: int
    seconds: list[float]
    extrapolated: bool = False
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    read_bytes: int | None = None
    error: float | None = None

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return median(self.seconds)


@dataclass(frozen=True)
class Table:
    """All measurements of one task on some cores, made in one run.

    Attributes:
        task: what was done.
        cores: how many the process was pinned to.
        measurements: of each implementation, ours first.
        software: "isa" and "torch" of the process that worked.
        nbytes: bytes that must be moved.
        flops: operations that must be done.
        bandwidth: bytes per second, read and written, that a copy reached in this run.
        peak: operations per second that a large matrix product reached in this run.
        tokens: of calibration samples; None where there are none.
        largest: bytes of the largest matrix in float32; None where nobody asks.
    """

    task: Task
    cores: int
    measurements: list[Measurement]
    software: dict[str, str]
    nbytes: int
    flops: int
    bandwidth: float
    peak: float
    tokens: int | None = None
    largest: int | None = None

    @property
    def floor(self) -> float:
        """Seconds that the bytes or the operations take at these rates, whichever is more."""
        return max(self.nbytes / self.bandwidth, self.flops / self.peak)

    def of(self, implementation: str) -> Measurement:
        """The fastest measurement of that name, over its numbers of threads."""
        return min((x for x in self.measurements if x.implementation == implementation), key=lambda x: x.median)

    def ratio(self, measurement: Measurement) -> float:
        """How many times as long as ours it takes."""
        return measurement.median / self.measurements[0].median

    def rows(self, machine: dict[str, str]) -> Iterator[dict[str, Any]]:
        """One row of the CSV per measurement."""
        case = self.task.case
        conditioned = isinstance(case, Adapter | Cores)
        for x in self.measurements:
            yield {
                "work": self.task.work,
                "case": str(case),
                "rank": case.rank,
                "dtype": case.dtype,
                "kappa_min": f"{KAPPAS[0]:g}" if conditioned else "",
                "kappa_max": f"{KAPPAS[1]:g}" if conditioned else "",
                "cores": self.cores,
                "threads": x.threads,
                "implementation": x.implementation,
                "median_s": f"{x.median:.5g}",
                "min_s": f"{min(x.seconds):.5g}",
                "max_s": f"{max(x.seconds):.5g}",
                "repeats": len(x.seconds),
                "ratio_to_ours": f"{self.ratio(x):.4g}",
                "extrapolated": "yes" if x.extrapolated else "no",
                "peak_bytes": x.peak_bytes,
                "saved_bytes": x.saved_bytes,
                "read_bytes": x.read_bytes,
                "error": "" if x.error is None else f"{x.error:.2g}",
                "tokens": self.tokens,
                "bytes": self.nbytes,
                "flops": self.flops,
                "bandwidth_bytes_s": f"{self.bandwidth:.4g}",
                "peak_flops_s": f"{self.peak:.4g}",
                "floor_s": f"{self.floor:.5g}",
                **self.software,
                **machine,
            }

    def __str__(self) -> str:
        lines = [
            f"{self.task.work}: {self.task.case}, {self.cores} core(s)",
            f"  {'implementation':<34}{'threads':>8}{'median s':>11}{'min':>10}{'max':>10}{'repeats':>9}{'× ours':>9}",
        ]
        for x in self.measurements:
            note = "  extrapolated from a part" * x.extrapolated
            for what, nbytes in (("peak", x.peak_bytes), ("saved", x.saved_bytes), ("read", x.read_bytes)):
                if nbytes is not None:
                    note += f"  {what} {nbytes / 1e6:.0f} MB"
            if x.error is not None:
                note += f"  alphas differ by {x.error:.1g}"
            lines.append(
                f"  {x.implementation:<34}{x.threads:>8}{x.median:>11.4f}{min(x.seconds):>10.4f}"
                f"{max(x.seconds):>10.4f}{len(x.seconds):>9}{self.ratio(x):>9.2f}{note}"
            )
        work = f"{self.nbytes / 1e9:.3g} GB at {self.bandwidth / 1e9:.3g} GB/s"
        if self.flops:
            work += f", {self.flops / 1e9:.3g} Gflop at {self.peak / 1e9:.3g} Gflop/s"
        lines.append(f"  {'floor':<42}{self.floor:>11.4f}{self.floor / self.measurements[0].median:>38.2f}  {work}")
        return "\n".join(lines)


def write_csv(path: Path, tables: Iterable[Table], machine: dict[str, str]) -> None:
    """Every measurement of every table, one per row."""
    rows = [row for table in tables for row in table.rows(machine)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

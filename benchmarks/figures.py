"""The figures to reach, and whether they are. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import cases, files
from benchmarks.cases import Adapter, Task
from benchmarks.records import Table


@dataclass(frozen=True)
class Figure:
    """One line of the table of figures.

    Attributes:
        text: what is compared with what.
        task: where it is measured.
        measure: the figure, from the table of that task on most cores.
        target: what to reach.
        at_least: whether more is better.
    """

    text: str
    task: Task
    measure: Callable[[Table], float]
    target: float
    at_least: bool

    def line(self, tables: Sequence[Table]) -> str | None:
        """The figure, its target, and PASS or short; None if the task was not run."""
        found = [table for table in tables if table.task == self.task]
        if not found:
            return None
        value = self.measure(max(found, key=lambda table: table.cores))
        reached = value >= self.target if self.at_least else value <= self.target
        sign = ("≥" if self.at_least else "≤") + f" {self.target:g}"
        return f"  {self.text:<96}{value:>8.2f}{sign:>8}  {'PASS' if reached else 'short'}"


def times_faster(*peers: str) -> Callable[[Table], float]:
    """How many times as long as ours the fastest of the peers takes, each with its best number of threads."""
    return lambda table: min(table.ratio(table.of(peer)) for peer in peers)


def times_as_long(name: str, other: str) -> Callable[[Table], float]:
    """Median of one over median of the other."""
    return lambda table: table.of(name).median / table.of(other).median


def memory(table: Table) -> float:
    """Peak of the edit over 8 times the largest module's factors plus 500 MB."""
    assert isinstance(table.task.case, Adapter)
    peak = table.of(files.EDIT).peak_bytes
    assert peak is not None
    return peak / (8 * table.task.case.largest_module + 500e6)


FIGURES = (
    Figure(
        f"SVD + rebuild, {cases.SURGERY_70B.case}: per-module QR + SVD + rebuild in torch / ours",
        cases.SURGERY_70B,
        times_faster("torch QR + SVD"),
        10,
        at_least=True,
    ),
    Figure(
        f"SVD + rebuild, {cases.ALL_70B.case}: the same",
        cases.ALL_70B,
        times_faster("torch QR + SVD"),
        8,
        at_least=True,
    ),
    Figure(
        f"SVD of {cases.CORES_64.case}: torch, its best way and thread count / ours",
        cases.CORES_64,
        times_faster("torch batched SVD", "torch SVD one by one"),
        4,
        at_least=True,
    ),
    Figure(
        f"edit, {cases.EDIT_70B.case}, without start-up / cp + sync",
        cases.EDIT_70B,
        times_as_long(files.WORK, files.COPY),
        2,
        at_least=False,
    ),
    Figure(
        "start-up of that command / python -c 'import torch'",
        cases.EDIT_70B,
        times_as_long(files.START, files.TORCH),
        1.3,
        at_least=False,
    ),
    Figure(
        "peak memory of that edit / (8 × factors of the largest module + 500 MB)",
        cases.EDIT_70B,
        memory,
        1,
        at_least=False,
    ),
)

"""The figures to reach, and whether they are. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks import files, tasks
from benchmarks.cases import ITEMSIZE, Adapter, Calibration, Task
from benchmarks.records import Measurement, Table
from benchmarks.scaling import Shape
from benchmarks.tasks import ONE, OURS, STREAMED, SUMMED, TWO, WITHOUT


@dataclass(frozen=True)
class Figure:
    """One line of the table of figures.

    Attributes:
        text: what is compared with what.
        task: where it is measured.
        measure: the figure, from the table of that task on most cores; None where a peer is absent.
        target: what to reach.
        at_least: whether more is better.
    """

    text: str
    task: Task
    measure: Callable[[Table], float | None]
    target: float
    at_least: bool

    def line(self, tables: Sequence[Table]) -> str | None:
        """The figure, its target, and PASS or short; None if the task was not run."""
        found = [table for table in tables if table.task == self.task]
        if not found:
            return None
        value = self.measure(max(found, key=lambda table: table.cores))
        if value is None:
            return f"  {self.text:<96}  not measured"
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


def faster(ours: str, other: str) -> Callable[[Table], float]:
    """How many times as long as one of ours the other takes, by their medians."""
    return times_as_long(other, ours)


def paired(name: str, other: str) -> Callable[[Table], float]:
    """Median over the rounds of one's time over the other's: what disturbs a round disturbs both."""
    return lambda table: median(a / b for a, b in zip(table.of(name).seconds, table.of(other).seconds, strict=True))


def extra_memory(table: Table) -> float:
    """What autograd keeps more with g per sample than without g, over 2 bytes per token, rank and module."""
    case, (with_g, without) = table.task.case, (table.of(x).saved_bytes for x in (OURS, WITHOUT))
    assert isinstance(case, Calibration)
    assert with_g is not None
    assert without is not None
    assert table.tokens is not None
    return (with_g - without) / (table.tokens * case.rank * 2 * case.modules)


def peak_gigabytes(table: Table) -> float:
    """Peak resident set."""
    peak = table.of(STREAMED).peak_bytes
    assert peak is not None
    return peak / 1e9


def times_read(table: Table) -> float:
    """Bytes of weights read over those of all linear layers, embeddings and the head."""
    case, read = table.task.case, table.of(STREAMED).read_bytes
    assert isinstance(case, Calibration)
    assert read is not None
    return read / (Shape.of(case).parameters * ITEMSIZE[case.dtype])


def against_weightwatcher(what: Callable[[Table, Measurement], float | None]) -> Callable[[Table], float | None]:
    """Something of WeightWatcher's measurement; None where it was left out."""

    def measure(table: Table) -> float | None:
        found = [x for x in table.measurements if x.implementation.startswith(tasks.WEIGHTWATCHER)]
        return what(table, found[0]) if found else None

    return measure


def spectra_memory(table: Table) -> float:
    """Peak of the analysis over 4 times the largest matrix in float32 plus 500 MB."""
    peak = table.of(OURS).peak_bytes
    assert peak is not None
    assert table.largest is not None
    return peak / (4 * table.largest + 500e6)


CALIBRATION = "calibrate, bfloat16 Llama of 8 layers"
FIGURES = (
    Figure(
        f"SVD + rebuild, {tasks.SURGERY_70B.case}: per-module QR + SVD + rebuild in torch / ours",
        tasks.SURGERY_70B,
        times_faster("torch QR + SVD"),
        10,
        at_least=True,
    ),
    Figure(
        f"SVD + rebuild, {tasks.ALL_70B.case}: the same",
        tasks.ALL_70B,
        times_faster("torch QR + SVD"),
        8,
        at_least=True,
    ),
    Figure(
        f"SVD of {tasks.CORES_64.case}: torch, its best way and thread count / ours",
        tasks.CORES_64,
        times_faster("torch batched SVD", "torch SVD one by one"),
        4,
        at_least=True,
    ),
    *(
        Figure(
            f"gate.embed + novelty, {task.case}: the original's method in torch / ours",
            task,
            times_faster(tasks.ORIGINAL),
            5,
            at_least=True,
        )
        for task in (tasks.LOOK, tasks.LOOK_32)
    ),
    Figure(
        "the same in bfloat16, in % of the forward pass of a Llama with 16 layers of 2048 on those tokens",
        tasks.LOOK,
        lambda table: 100 * times_as_long(OURS, tasks.PASS)(table),
        2,
        at_least=False,
    ),
    Figure(
        f"update of the directions, {tasks.UPDATE.case}: SVD of m × (k + 1) in torch / ours",
        tasks.UPDATE,
        times_faster(tasks.SVD_EACH),
        5,
        at_least=True,
    ),
    Figure(
        f"edit, {tasks.EDIT_70B.case}, without start-up / cp + sync",
        tasks.EDIT_70B,
        times_as_long(files.WORK, files.COPY),
        2,
        at_least=False,
    ),
    Figure(
        "start-up of that command / python -c 'import torch'",
        tasks.EDIT_70B,
        times_as_long(files.START, files.TORCH),
        1.3,
        at_least=False,
    ),
    Figure(
        "peak memory of that edit / (8 × factors of the largest module + 500 MB)",
        tasks.EDIT_70B,
        memory,
        1,
        at_least=False,
    ),
    *(
        Figure(f"{CALIBRATION}: {peer} / ours", tasks.CALIBRATE, faster(ours, peer), target, at_least=True)
        for peers, target in ((tasks.HOOKS, 3.0), (tasks.PLAIN, 1.8))
        for ours, peer in zip((OURS, tasks.BATCH_8), peers, strict=True)
    ),
    *(
        Figure(f"a pass with {what} / without g", tasks.COST, paired(name, WITHOUT), 1.02, at_least=False)
        for what, name in (("g per sample", OURS), ("g summed", SUMMED))
    ),
    Figure(
        "memory that a pass keeps for g per sample / (tokens × r × 2 bytes × modules)",
        tasks.COST,
        extra_memory,
        1.2,
        at_least=False,
    ),
    Figure("probe --stream, Llama-2-7B shape: peak memory in GB", tasks.STREAM, peak_gigabytes, 3, at_least=False),
    Figure("the same: weights read / weights", tasks.STREAM, times_read, 2.05, at_least=False),
    Figure(
        "streamed / in memory, float32 Llama of 8 layers, g equal to 1e-5",
        tasks.STREAM_OR_MEMORY,
        times_as_long(OURS, tasks.IN_MEMORY),
        1.3,
        at_least=False,
    ),
    Figure(
        "calibrate: 1 rank / 2 ranks on gloo, one thread each",
        tasks.RANKS,
        faster(TWO, ONE),
        1.7,
        at_least=True,
    ),
    *(
        figure
        for task in (tasks.MINILM, tasks.WIDE)
        for figure in (
            Figure(
                f"spectra and tail exponents, {task.case}: WeightWatcher / ours",
                task,
                against_weightwatcher(Table.ratio),
                5,
                at_least=True,
            ),
            Figure(
                "the same: largest difference of exponents in 1e-3",
                task,
                against_weightwatcher(lambda _, x: None if x.error is None else 1e3 * x.error),
                1,
                at_least=False,
            ),
            Figure(
                "the same: svdvals per layer in torch, in its best way / ours",
                task,
                times_faster(tasks.SVDVALS, tasks.SIDE_BY_SIDE),
                1.5,
                at_least=True,
            ),
            Figure(
                "the same: peak memory / (4 × the largest matrix in float32 + 500 MB)",
                task,
                spectra_memory,
                1,
                at_least=False,
            ),
        )
    ),
    Figure(
        f"spline forward + backward, {tasks.SPLINE.case}: {tasks.TORCH_SPLINE} / ours",
        tasks.SPLINE,
        times_faster(tasks.TORCH_SPLINE),
        4,
        at_least=True,
    ),
    *(
        Figure(
            f"resize to r = 16, file to file, {tasks.RESIZE_7B.case}: {peer} / ours",
            tasks.RESIZE_7B,
            times_faster(peer),
            target,
            at_least=True,
        )
        for peer, target in ((tasks.DENSE_SVD, 1000), (tasks.SVD_LOWRANK, 10))
    ),
    Figure(
        f"inspect, {tasks.INSPECT_312.case}: per-module QR + SVD in torch / ours",
        tasks.INSPECT_312,
        times_faster(tasks.QR_SVD),
        8,
        at_least=True,
    ),
    Figure(
        f"add_weighted_adapter (svd), two of {tasks.WEIGHTED.case}: PEFT / with the backend, equal to 1e-5",
        tasks.WEIGHTED,
        times_faster(tasks.PEFT),
        100,
        at_least=True,
    ),
)

"""Calibration as whole commands: a streamed model, and several processes. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.cases import ITEMSIZE, ONE, STREAMED, TWO, Calibration, Task
from benchmarks.records import Measurement, Table
from benchmarks.timing import Finished, run_pinned

WHOLE = "{}, the whole command"
KEPT = "100MB"  # activations that are kept instead of computed again


def stream(task: Task, all_cores: Sequence[int], work_dir: Path | None) -> Iterator[Table]:
    """`spectral-fast probe --stream` on a model of random weights, on most cores; peak memory, and weights read.

    Weights are mapped, so that the peak resident set has all pages of the files that were in memory at a time. What
    was read is what the engine has counted; the files are not in the page cache when it starts.

    Args:
        task: the model.
        all_cores: numbers of cores to pin to, of which the last is taken.
        work_dir: where to write the model; None for the system's.
    """
    case, cores = task.case, max(all_cores)
    assert isinstance(case, Calibration)
    with TemporaryDirectory(dir=work_dir) as directory:
        folder = Path(directory, "case")
        make = [sys.executable, "-m", "benchmarks.models", task.dumps(), str(folder)]
        made = json.loads(run_pinned(make, cores).output)
        finished, read = [], []
        for _ in range(task.rounds):
            _forget(folder / "model")
            finished.append(_probe(case, folder, cores))
            record = json.loads((folder / "out" / "sensitivity.json").read_text(encoding="utf-8"))
            read.append(record["weights_read"])
        measured = Measurement(
            STREAMED,
            cores,
            [x.seconds for x in finished],
            peak_bytes=max(x.peak_bytes for x in finished),
            read_bytes=max(read),
        )
        yield Table(task, cores, [measured], **made)


def ranks(task: Task, all_cores: Sequence[int], _: Path | None) -> Iterator[Table]:
    """`calibrate` in one process, and split over two by torchrun, each on a core of its own and with one thread.

    Timed is what ``benchmarks.ranks`` says, and the whole commands: Python, torch and the model are then made once per
    process. Both find the same g. The peak of the table is one core's.

    Args:
        task: the model.
        all_cores: numbers of cores; with fewer than two there is nothing to compare.
        _: not needed.
    """
    assert isinstance(task.case, Calibration)
    if max(all_cores) < 2:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    seconds: dict[str, list[float]] = {}
    results = []
    for _ in range(task.rounds):
        for name, launcher, cores in ((TWO, torchrun, 2), (ONE, [], 1)):
            done = run_pinned([sys.executable, *launcher, "-m", "benchmarks.ranks", task.dumps()], cores)
            results.append(json.loads(done.output))
            seconds.setdefault(name, []).append(results[-1]["seconds"])
            seconds.setdefault(WHOLE.format(name), []).append(done.seconds)
    _same([x["g"] for x in results], task.case.rounding)
    threads = {name: 2 if TWO in name else 1 for name in seconds}
    measured = [Measurement(name, threads[name], seconds[name]) for name in seconds]
    yield Table(task, 2, measured, **results[-1]["table"])


def _same(found: Sequence[list[float]], limit: float) -> None:
    """Refuse g that is not the first one to rounding."""
    for g in found:
        error = math.dist(g, found[0]) / math.hypot(*found[0])
        if not error <= limit:
            raise ValueError(f"g of two runs differs by {error:.2g} of its norm; rounding explains {limit:.2g}")


def _probe(case: Calibration, folder: Path, cores: int) -> Finished:
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [
        *(str(Path(sysconfig.get_path("scripts"), "spectral-fast")), "probe"),
        *("--base_model", str(folder / "model"), "--lora_path", str(folder / "adapter")),
        *("--calib_data", str(folder / "samples.jsonl"), "--calib_samples", str(case.samples)),
        *("--dtype", {2: "bf16", 4: "fp32"}[ITEMSIZE[case.dtype]], "--device", "cpu"),
        *("--stream", "--activation_memory", KEPT, "--out_dir", str(folder / "out")),
    ]
    return run_pinned(command, cores)


def _forget(folder: Path) -> None:
    """Take files out of the page cache, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

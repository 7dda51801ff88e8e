"""The edit from file to file, beside ``cp``: whole commands, timed and measured from outside. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.cases import LLAMA3_70B, Adapter, Model, Task
from benchmarks.records import Measurement, Table
from benchmarks.timing import Finished, run_pinned

WORK, HASHED, EDIT, TOUCHED, START, COPY, TORCH = (
    "edit, without its start-up",
    "… of an adapter touched since the probe",
    "edit",
    "edit of an adapter touched since the probe",
    "start-up (edit of a tiny adapter)",
    "cp + sync",
    "python -c 'import torch'",
)
# One layer of narrow modules: the same command, with next to nothing to do.
SMALL = Model(LLAMA3_70B.name, 1, dict.fromkeys(LLAMA3_70B.shapes, (64, 64)))
WEIGHTS = "adapter_model.safetensors"


def edit(task: Task, all_cores: Sequence[int], work_dir: Path | None) -> Iterator[Table]:
    """Times `spectral-fast edit --sensitivity` of an adapter whose files are in the page cache.

    In every round, one after the other: `cp` of the weights and `sync` of the copy; the edit, which syncs before it
    ends; the same after a touch of the file; the same of a tiny adapter; and an interpreter that imports torch.
    Nothing is left to be written to disk when a clock starts.

    Args:
        task: the adapter and the number of rounds.
        all_cores: numbers of cores to pin to, one table each.
        work_dir: where to put some four times the adapter's size; None for the system's.
    """
    assert isinstance(task.case, Adapter)
    tiny = replace(task, case=replace(task.case, model=SMALL, rank=8))
    with TemporaryDirectory(dir=work_dir) as directory:
        big, small = Path(directory, "big"), Path(directory, "small")
        software = json.loads(_helper("make", task, big, max(all_cores)).output)
        _helper("make", tiny, small, max(all_cores))
        for cores in all_cores:
            _edit_command(big, cores)
            _helper("check", task, big, cores)
            rounds = [_round(big, small, cores) for _ in range(task.rounds)]
            nbytes = 2 * task.case.nbytes  # read and written
            bandwidth = nbytes / median(x[COPY].seconds for x in rounds)
            yield Table(task, cores, _measurements(rounds, cores), software, nbytes, 0, bandwidth, math.inf)


def _round(big: Path, small: Path, cores: int) -> dict[str, Finished]:
    finished = {}
    copy = 'cp "$0" "$1" && sync "$1"'
    _clean(big, small)
    finished[COPY] = run_pinned(["sh", "-c", copy, str(big / "adapter" / WEIGHTS), str(big / "copy")], cores)
    _clean(big, small)
    finished[EDIT] = _edit_command(big, cores)
    _clean(big, small)
    weights = big / "adapter" / WEIGHTS
    before = weights.stat()
    os.utime(weights)  # so its hash is taken anew
    finished[TOUCHED] = _edit_command(big, cores)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    _clean(big, small)
    finished[START] = _edit_command(small, cores)
    finished[TORCH] = run_pinned([sys.executable, "-c", "import torch"], cores)
    return finished


def _edit_command(folder: Path, cores: int) -> Finished:
    command = [
        *(str(Path(sysconfig.get_path("scripts"), "spectral-fast")), "edit", "--mode", "abs_select"),
        *("--lora_path", str(folder / "adapter"), "--target_modules", "all-linear"),
        *("--sensitivity", str(folder / "sensitivity"), "--out_dir", str(folder / "edited")),
    ]
    return run_pinned(command, cores)


def _clean(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder / "edited", ignore_errors=True)
        (folder / "copy").unlink(missing_ok=True)
    os.sync()


def _measurements(rounds: list[dict[str, Finished]], cores: int) -> list[Measurement]:
    work = {
        name: [x[whole].seconds - x[START].seconds for x in rounds] for name, whole in ((WORK, EDIT), (HASHED, TOUCHED))
    }
    whole = [
        Measurement(
            name,
            cores,
            [x[name].seconds for x in rounds],
            peak_bytes=max(x[name].peak_bytes for x in rounds),
        )
        for name in (EDIT, TOUCHED, START, COPY, TORCH)
    ]
    return [*(Measurement(name, cores, seconds) for name, seconds in work.items()), *whole]


def _helper(action: str, task: Task, folder: Path, cores: int) -> Finished:
    return run_pinned([sys.executable, "-m", "benchmarks.adapter_file", action, task.dumps(), str(folder)], cores)

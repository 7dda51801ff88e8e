"""Interleaved repeats inside a process, and whole commands pinned to some cores. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

# Every threading runtime that torch, SciPy and NumPy may bring.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Seconds before each run: OpenBLAS' threads wait for work by spinning, and would take cores from what comes after them.
SETTLE = 0.1
ROOT = Path(__file__).resolve().parents[1]


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Wall time of a call in seconds, and what it returned."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def interleave(runs: Mapping[Key, Callable[[], object]], rounds: int, budget: float) -> dict[Key, list[float]]:
    """Seconds of each run, one after the other in every round, so that what disturbs one disturbs its neighbours.

    A run that has taken `budget` seconds in all is left out of the rounds that remain; each runs at least once.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            if sum(seconds[key]) < budget:
                time.sleep(SETTLE)
                seconds[key].append(timed(run)[0])
    return seconds


@dataclass(frozen=True)
class Finished:
    """A command that ended well: its wall time, its peak resident set and what it printed."""

    seconds: float
    peak_bytes: int
    output: str


def run_pinned(command: Sequence[str], cores: int) -> Finished:
    """Run a command from the repository's root on the first `cores` cores, with as many threads.

    Raises:
        ValueError: this process may not use so many cores.
        RuntimeError: the command failed.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if cores > len(allowed):
        raise ValueError(f"{cores} cores are wanted, but this process may use {len(allowed)}")
    threads = dict.fromkeys(THREAD_VARIABLES, str(cores))
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | threads
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed[:cores]),
    )
    assert process.stdout is not None
    output = process.stdout.read()
    # Of this child alone. Linux counts the parent's pages at the fork, too: hence no torch in this process.
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` ended with status {process.returncode}")
    return Finished(seconds, usage.ru_maxrss * 1024, output)

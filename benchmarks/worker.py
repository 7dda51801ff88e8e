"""One workload in a process of its own: ``python -m benchmarks.worker TASK CORES`` prints its table as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import calibration, floors, head, peers, stream, streamed, toolbox, weighted, workloads
from benchmarks.cases import Task
from benchmarks.machine import software
from benchmarks.records import Measurement, Table
from benchmarks.timing import interleave, timed
from benchmarks.workloads import Candidate, Workload

PREPARE: dict[str, Callable[[Any, Sequence[str]], Workload]] = {
    "rebuild": workloads.rebuild,
    "svd": workloads.svd,
    "sensitivity": workloads.sensitivity,
    "gate": head.looks,
    "update": stream.updates,
    "spline": workloads.spline,
    "calibrate": calibration.calibrations,
    "cost of g": calibration.cost_of_g,
    "stream or memory": streamed.stream_or_memory,
    "resize": toolbox.resize,
    "inspect": toolbox.inspect,
    "weighted": weighted.weighted,
}


def measure(task: Task, cores: int, candidates: Iterable[Candidate]) -> list[Measurement]:
    """Each candidate once for the gate, then all in turn."""
    once: dict[tuple[str, int], float] = {}
    runs: dict[tuple[str, int], Callable[[], None]] = {}
    shares: dict[str, float] = {}
    saved: dict[str, int] = {}
    for x in candidates:
        torch.set_num_threads(cores)
        x.warm_up()
        torch.manual_seed(0)  # what passes the gate once passes it always, of peers that draw at random, too
        first, result = timed(x.run)
        x.check(result)
        del result
        if x.saved is not None:
            saved[x.name] = x.saved()
        shares[x.name] = x.share
        for threads in (cores, 1) if cores > 1 and x.name in peers.ONE_THREAD_TOO else (cores,):
            runs[x.name, threads] = partial(_run_with, threads, x.run)
        if first > task.budget:
            once[x.name, cores] = first
    repeated = interleave({key: run for key, run in runs.items() if key not in once}, task.rounds, task.budget)
    return [
        Measurement(
            name, threads, [t / shares[name] for t in times], extrapolated=shares[name] < 1, saved_bytes=saved.get(name)
        )
        for (name, threads) in runs
        for times in [[once[name, threads]] if (name, threads) in once else repeated[name, threads]]
    ]


def _run_with(threads: int, run: Callable[[], object]) -> None:
    torch.set_num_threads(threads)  # costs microseconds where nothing changes
    run()


def main() -> None:
    """Read the task, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Task.loads)
    parser.add_argument("cores", type=int)
    args = parser.parse_args()
    task: Task = args.task
    torch.set_num_threads(args.cores)
    with torch.no_grad():
        workload = PREPARE[task.work](task.case, [peers.OURS, *task.peers])
        measurements = measure(task, args.cores, workload.candidates)
        torch.set_num_threads(args.cores)
        rates = floors.bandwidth(workload.copied), floors.peak(*workload.dtypes)
    table = asdict(
        Table(task, args.cores, measurements, software(), workload.nbytes, workload.flops, *rates, workload.tokens)
    )
    del table["task"]
    print(json.dumps(table))


if __name__ == "__main__":
    main()

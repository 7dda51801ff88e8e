"""One workload in a process of its own: ``python -m benchmarks.worker TASK CORES`` prints its table as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import floors, gate, peers
from benchmarks.cases import TINY, Adapter, Cores, Task
from benchmarks.factors import core_matrices, with_outputs
from benchmarks.machine import software
from benchmarks.peers import OURS
from benchmarks.records import Measurement, Table
from benchmarks.timing import interleave, timed


@dataclass(frozen=True)
class Candidate:
    """An implementation with its input.

    Attributes:
        name: of the implementation.
        warm_up: the same on something small: imports, threads, and code pages, which a first run would pay for.
        run: does the work.
        check: raises ``WrongResult`` if what `run` returned is wrong.
        share: the part of the case that `run` does.
    """

    name: str
    warm_up: Callable[[], Any]
    run: Callable[[], Any]
    check: Callable[[Any], None]
    share: float = 1.0


def rebuild(case: Adapter, names: list[str]) -> tuple[Iterator[Candidate], Callable[[], float]]:
    """The singular values and new factors of an adapter, and a measurement of the bandwidth of a copy."""
    factors = with_outputs(case)
    # The reference says which singular values are right, and so which ones to rebuild with.
    true_s = peers.by_reference(factors)
    factors = replace(factors, s_new=[gate.amplified(s) for s in true_s])
    small = with_outputs(replace(case, model=TINY, rank=min(case.rank, 8)))
    shapes = list(case.shapes().values())
    smallest = min(range(len(shapes)), key=lambda i: shapes[i][0] * shapes[i][1])

    def candidates() -> Iterator[Candidate]:
        for name in names:
            part, s, share = factors, true_s, 1.0
            if cost := peers.DENSE_COST.get(name):
                costs = [cost(m, n, case.rank) for m, n in shapes]
                part, s, share = factors.only(smallest), true_s[smallest : smallest + 1], costs[smallest] / sum(costs)
            for out in part.outs:
                for x in out:
                    x.fill_(torch.nan)  # what a predecessor wrote must not count
            run, check = peers.REBUILD[name], partial(gate.check_rebuilt, name, part, s)
            yield Candidate(name, partial(run, small), partial(run, part), check, share)

    pairs = [pair for b, a, _, (b_out, a_out) in factors for pair in ((b_out, b), (a_out, a))]
    return candidates(), partial(floors.bandwidth, pairs)


def svd(case: Cores, names: list[str]) -> tuple[Iterator[Candidate], Callable[[], float]]:
    """U, s and Vᵀ of a batch of small matrices, and a measurement of the bandwidth of a copy."""
    matrices = core_matrices(case)
    candidates = (
        Candidate(name, partial(run, matrices[:2]), partial(run, matrices), partial(gate.check_svd, name, matrices))
        for name in names
        for run in [peers.SVD[name]]
    )
    return candidates, partial(floors.bandwidth, [(torch.empty_like(matrices), matrices)])


def measure(task: Task, cores: int, candidates: Iterator[Candidate]) -> list[Measurement]:
    """Each candidate once for the gate, then all in turn."""
    once: dict[tuple[str, int], float] = {}
    runs: dict[tuple[str, int], Callable[[], None]] = {}
    shares: dict[str, float] = {}
    for x in candidates:
        torch.set_num_threads(cores)
        x.warm_up()
        first, result = timed(x.run)
        x.check(result)
        del result
        shares[x.name] = x.share
        for threads in (cores, 1) if cores > 1 and x.name in peers.ONE_THREAD_TOO else (cores,):
            runs[x.name, threads] = partial(_run_with, threads, x.run)
        if first > task.budget:
            once[x.name, cores] = first
    repeated = interleave({key: run for key, run in runs.items() if key not in once}, task.rounds, task.budget)
    return [
        Measurement(name, threads, [t / shares[name] for t in times], extrapolated=shares[name] < 1)
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
    names = [OURS, *task.peers]
    torch.set_num_threads(args.cores)
    with torch.no_grad():
        if isinstance(task.case, Adapter):
            candidates, bandwidth = rebuild(task.case, names)
            work = floors.rebuild_work(task.case)
            # Products of bfloat16 are as good in float32, where that is faster.
            dtypes = {getattr(torch, task.case.dtype), torch.float32}
        else:
            candidates, bandwidth = svd(task.case, names)
            work, dtypes = floors.svd_work(task.case), {torch.float64}
        measurements = measure(task, args.cores, candidates)
        torch.set_num_threads(args.cores)
        table = asdict(Table(task, args.cores, measurements, software(), *work, bandwidth(), floors.peak(*dtypes)))
    del table["task"]
    print(json.dumps(table))


if __name__ == "__main__":
    main()

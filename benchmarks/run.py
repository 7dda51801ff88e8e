"""``python -m benchmarks``: every task in processes of its own, pinned; tables, figures and the CSV."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import commands, files, tasks
from benchmarks.cases import Task
from benchmarks.figures import FIGURES
from benchmarks.machine import command, commit, hardware, slug
from benchmarks.records import Measurement, Table, write_csv
from benchmarks.timing import run_pinned

COMMANDS = {"edit": files.edit, "stream": commands.stream, "ranks": commands.ranks, "spectra": commands.spectra}
RESULTS = Path(__file__).parent / "results"


def tables(chosen: Sequence[Task], all_cores: Sequence[int], work_dir: Path | None) -> Iterator[Table]:
    """The tables of each task, on each number of cores."""
    for task in chosen:
        if task.work in COMMANDS:
            yield from COMMANDS[task.work](task, all_cores, work_dir)
            continue
        for cores in all_cores:
            output = run_pinned([sys.executable, "-m", "benchmarks.worker", task.dumps(), str(cores)], cores).output
            fields = json.loads(output)
            fields["measurements"] = [Measurement(**x) for x in fields["measurements"]]
            yield Table(task, **fields)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tasks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tasks with this in their name; see --list")
    parser.add_argument("--list", action="store_true", help="print the names of the tasks")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="numbers of cores to pin to (1 2)")
    parser.add_argument("--work_dir", type=Path, help="where files are written: 14 GB on a disk, not in memory")
    parser.add_argument("--out", type=Path, help="the CSV (default: results/MACHINE.csv for all tasks, else none)")
    args = parser.parse_args(argv)
    chosen = [task for task in (tasks.QUICK if args.quick else tasks.FULL) if args.only in f"{task.work}: {task.case}"]
    if not chosen:
        parser.error(f"--only {args.only!r} is in no task's name; --list prints them")
    if args.list:
        print(*(f"{task.work}: {task.case}" for task in chosen), sep="\n")
        return 0

    machine = {**hardware(), "commit": commit(), "command": command("benchmarks", argv)}
    done = []
    for table in tables(chosen, args.cores, args.work_dir):
        print(table, end="\n\n", flush=True)
        done.append(table)

    lines = [line for figure in FIGURES if (line := figure.line(done))]
    print(*(["Figures, on most cores:", *lines] if lines else ["No figure to reach is among these tasks."]), sep="\n")
    facts = machine | done[0].software
    print(" | ".join(f"{name} {value}" for name, value in facts.items()))
    out = args.out
    if out is None and not (args.quick or args.only):
        out = RESULTS / f"{slug(facts)}.csv"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(out, done, machine)
        print(f"wrote {out.name}: {sum(len(table.measurements) for table in done)} rows")
    return 0

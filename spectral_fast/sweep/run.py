"""Run a sweep: what is finished is never repeated, and the table does not depend on how often it was interrupted."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectral_fast.sweep.config import Config
from spectral_fast.sweep.ledger import LEDGER, open_ledger
from spectral_fast.sweep.plan import CONTROLS, Plan, Planner, Run
from spectral_fast.sweep.results import TABLES, write_results
from spectral_fast.sweep.tasks import check_sandbox
from spectral_fast.sweep.work import ADAPTER, PROBES, RUNS, Settings, Worker, group_size, with_group_size


def run_sweep(
    configs: Sequence[Config],
    settings: Settings,
    *,
    controls: int = CONTROLS,
    ray: str | None = None,
    workers: int | None = None,
    note: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Probe once per calibration, make every variant, evaluate them in groups, compare all, and write the tables.

    The folder gets `ledger.jsonl`, probes/, runs/, and at the end `results.json`, `results.jsonl`, `summary.csv`,
    `summary.tsv`, `summary_table.md` and `report.html`. A run of the same configurations there goes on where an
    earlier one was stopped; those that failed are tried again.

    Args:
        configs: parsed; all are checked against their adapters and data before anything is computed.
        settings: folder, models, engine.
        controls: see `Planner.plan`.
        ray: address of a Ray cluster, or "local"; None works in this process.
        workers: how many engines Ray runs; by default one per GPU.
        note: told what is about to be done.

    Returns:
        See `write_results`.
    """
    settings = replace(settings, engine=with_group_size(settings.engine))
    planner = Planner(settings.models, settings.engine)
    plan = planner.plan(configs, controls)
    out_dir = Path(settings.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    _check_ours(out_dir)
    with open_ledger(out_dir) as ledger:
        _remove_leftovers(out_dir)
        done = [name for name in ledger.runs if name in plan.runs and _is_there(plan.runs[name], out_dir)]
        groups = plan.groups(done, group_size(settings.engine))
        todo = sum(map(len, groups))
        note(f"{_counted(plan)}; {len(plan.runs) - todo} are finished, {todo} to do in {len(groups)} groups")
        if groups:
            tasks = [planner.task(group[0].config) for group in groups]
            for task in {id(task): task for task in tasks}.values():
                check_sandbox(task)
            for entry in _work(plan, planner, settings, groups, ray, workers):
                ledger.append(entry)
                for failure in entry["failures"]:
                    note(f"run {failure['id']} failed: {failure['error']}")
        return write_results(plan, planner, ledger, out_dir)


def _work(
    plan: Plan, planner: Planner, settings: Settings, groups: Sequence[Sequence[Run]], ray: str | None, workers: Any
) -> Iterator[Mapping[str, Any]]:
    """The ledger's entries, each when its group is finished."""
    needed = {run.probe for group in groups for run in group}
    probes = {name: probe for name, probe in plan.probes.items() if name in needed}
    adapters = _adapters_by_base(plan, planner)
    if ray is not None:
        from spectral_fast.sweep.cluster import on_ray

        yield from on_ray(settings, adapters, probes, groups, ray, workers)
        return
    with closing(Worker(settings, planner, adapters)) as worker:
        reasons = {name: worker.probe(name, probe) for name, probe in probes.items()}
        broken = {name: reason for name, reason in reasons.items() if reason is not None}
        for group in groups:
            yield worker.evaluate(group, broken)


def _adapters_by_base(plan: Plan, planner: Planner) -> dict[str, list[Path]]:
    """Base model -> the adapters that will run on it: an engine wants to know the largest rank."""
    found: dict[str, list[Path]] = {}
    for run in plan.runs.values():
        path = planner.source(run.config).adapter.path
        if path not in found.setdefault(run.config.base_model, []):
            found[run.config.base_model].append(path)
    return found


def _is_there(run: Run, out_dir: Path) -> bool:
    """Whether a run that the ledger has still has its files, with the adapter if that is to be kept."""
    folder = out_dir / RUNS / run.id
    return (folder / "config.json").is_file() and (not run.keeps_adapter or (folder / ADAPTER).is_dir())


def _check_ours(out_dir: Path) -> None:
    """Refuse to overwrite tables that no sweep has written."""
    found = [name for name in TABLES if (out_dir / name).exists()]
    if found and not (out_dir / LEDGER).exists():
        raise FileExistsError(
            errno.EEXIST, f"out_dir has {found[0]} and no {LEDGER}, so it is no sweep's; choose another", str(out_dir)
        )


def _remove_leftovers(out_dir: Path) -> None:
    """Half-made folders and files of a sweep that was killed; the ledger's lock says that nobody is at work on them."""
    for kind in (RUNS, PROBES):
        for folder in (out_dir / kind).glob(".*.partial"):
            shutil.rmtree(folder)
    for folder in (out_dir, *out_dir.glob("kept_adapters/*/*/*")):
        for name in TABLES:
            for file in folder.glob(f".{name}.*.partial"):
                file.unlink()


def _counted(plan: Plan) -> str:
    counts = [(len(plan.of_role(role)), role) for role in ("variant", "baseline", "control")]
    return f"{len(plan.lines)} configurations: " + ", ".join(
        f"{count} {role}{'' if count == 1 else 's'}" for count, role in counts
    )

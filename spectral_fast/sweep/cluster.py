"""A sweep on several GPUs or nodes: one Ray actor with an engine of its own per GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectral_fast.sweep.plan import Planner, Probe, Run
from spectral_fast.sweep.work import Settings, Worker, silent

HERE = "local"


def on_ray(
    settings: Settings,
    adapters: Mapping[str, Sequence[Path]],
    probes: Mapping[str, Probe],
    groups: Sequence[Sequence[Run]],
    address: str,
    workers: int | None,
) -> Iterator[Mapping[str, Any]]:
    """The ledger's entries of the groups, in the order in which they are finished.

    Every node needs spectral_fast, and sees the sweep's folder, the models, adapters and data under the same absolute
    paths. Only this process writes the ledger.

    Args:
        settings: as for a worker here.
        adapters: base model -> all adapters that will run on it.
        probes: what is to be probed first.
        groups: what is to be evaluated.
        address: of a cluster ("auto" for the one of this machine), or "local" to start one in this machine.
        workers: engines; by default one per GPU of the cluster, or one where there is none.

    Raises:
        RuntimeError: Ray is not installed, the cluster cannot be reached, or a worker died.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise RuntimeError(f"--ray needs Ray: pip install 'spectral-fast[ray]' ({error})") from error
    try:
        ray.init(None if address == HERE else address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise RuntimeError(f"no Ray cluster at {address}: {error}; start one by `ray start --head`") from error
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        settings = replace(settings, out_dir=Path(settings.out_dir).resolve(), counter=silent)
        actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Actor)
        actors = [
            actor.remote(settings, adapters, Path.cwd())
            for _ in range(min(workers or max(gpus, 1), max(len(groups), 1)))
        ]
        pool = ActorPool(actors)
        reasons = pool.map(lambda one, item: one.probe.remote(*item), list(probes.items()))
        broken = {name: reason for name, reason in zip(probes, reasons, strict=True) if reason is not None}
        yield from pool.map_unordered(lambda one, group: one.evaluate.remote(group, broken), groups)
        ray.get([one.close.remote() for one in actors])
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(f"a worker of the sweep has died; start the sweep again to go on: {error}") from error
    finally:
        ray.shutdown()


class _Actor(Worker):
    """A worker that opens adapters and data for itself, as they stand on its node."""

    def __init__(self, settings: Settings, adapters: Mapping[str, Sequence[Path]], directory: Path) -> None:
        os.chdir(directory)  # which names of models, adapters and data are relative to
        super().__init__(settings, Planner(settings.models, settings.engine), adapters)

"""Calibration as whole commands: a streamed model, and several processes. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.cases import ITEMSIZE, Calibration, Spectra, Task
from benchmarks.records import Measurement, Table
from benchmarks.tasks import ONE, OURS, STREAMED, TWO, WEIGHTWATCHER, WEIGHTWATCHER_PYTHON
from benchmarks.timing import Finished, run_pinned

WHOLE = "{}, the whole command"
SAME = 1e-3  # tail exponents
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


def spectra(task: Task, all_cores: Sequence[int], work_dir: Path | None) -> Iterator[Table]:
    """Spectra and tail exponents of all layers of a model, on most cores, each implementation in a process of its own.

    Ours begins with the files, and its peak resident set is that of the process; the others have the matrices in
    memory. Of layers that are alike peers are timed on one, times their number. WeightWatcher is left out where no
    interpreter that has it is named. Its exponents are the same to 1e-3, or there is no table.

    Args:
        task: the model, and how often ours is repeated; what takes long is not.
        all_cores: numbers of cores to pin to, of which the last is taken.
        work_dir: where to write the model and the matrices; None for the system's.
    """
    case, cores = task.case, max(all_cores)
    assert isinstance(case, Spectra)
    with TemporaryDirectory(dir=work_dir) as directory:
        folder = Path(directory, "case")
        folder.mkdir()
        worker = [sys.executable, "-m", "benchmarks.spectra", json.dumps(asdict(case)), str(folder)]
        made = json.loads(run_pinned([*worker, "make", "1"], cores).output)
        layers = made.pop("layers")
        rounds = str(task.rounds)
        measured, expected = [], {}
        for name in (OURS, *task.peers):
            if name == WEIGHTWATCHER:
                python = os.environ.get(WEIGHTWATCHER_PYTHON)
                if python is None:
                    print(
                        f"{name} is left out: {WEIGHTWATCHER_PYTHON} names no interpreter that has it", file=sys.stderr
                    )
                    continue
                script = Path(__file__).with_name("weightwatcher_peer.py")
                done = run_pinned([python, "-I", str(script), str(folder / "matrices.pt"), rounds], cores)
                found = json.loads(done.output)
                times = [found["seconds"][part] for part in case.groups]
                each = [[count * t for t in part] for part, count in zip(times, case.groups.values(), strict=True)]
                found["seconds"] = [sum(parts) for parts in zip(*each, strict=True)]
                name = f"{name} {found['version']}"
            else:
                done = run_pinned([*worker, name, rounds], cores)
                found = json.loads(done.output)
            expected = expected or found["alphas"]
            errors = [abs(alpha - expected[layer]) for layer, alpha in found["alphas"].items()]
            # Singular values in float32 may move the search to another start where two fit equally well.
            if not (max if name.startswith(WEIGHTWATCHER) else median)(errors) <= SAME:
                raise ValueError(f"{name}: tail exponents differ from ours by up to {max(errors):.2g}")
            own = name == OURS
            measured.append(
                Measurement(
                    name,
                    cores,
                    found["seconds"],
                    extrapolated=not own and len(found["alphas"]) < layers,
                    peak_bytes=done.peak_bytes if own else None,
                    error=None if own else max(errors),
                )
            )
        yield Table(task, cores, measured, **made)


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

"""Runs every workload on one device: the gate, the times and what the card allows, as one record and one table."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends
from spectral_fast.bench.cards import Card, card
from spectral_fast.bench.least import Work
from spectral_fast.bench.timing import milliseconds
from spectral_fast.bench.workloads import FULL, OURS, TINY, Case, groups
from spectral_fast.environment import describe
from spectral_fast.kernels.gpu import INTERPRETED

DEVICES = ("cuda", "interpreter")
ROUNDS, BUDGET_MS = 20, 3000.0


def run(device: str = "cuda", only: str = "", report: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Every kernel against its reference in float64 and, on a GPU, its time beside those of its peers.

    Args:
        device: "cuda"; or "interpreter": the kernels as Python on the CPU with tiny sizes, which shows that
            everything runs, and gives no times.
        only: run the workloads with this in their kernel's or their own name.
        report: told the name of each workload before it runs.

    Returns:
        what to send back: "device", its public peaks as "card" or None, "rows" (one per workload and implementation,
        times in ms), "failures": what of ours failed, in words, and "environment": see `describe`.

    Raises:
        ValueError: `device` is neither, or nothing has `only` in its name.
        RuntimeError: there is no GPU; or the interpreter is on or off, against what `device` says.
    """
    where = _device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "Triton's interpreter"
    known = card(name)
    rows = []
    torch.manual_seed(0)
    with _forced("gpu"):
        environment = describe()  # with the backends as they are forced here
        for titles, make in groups(TINY if INTERPRETED else FULL, where):
            wanted = [title for title in titles if only in ": ".join(title)]
            if not wanted:  # making its tensors alone may take minutes
                continue
            try:
                for case in make():
                    if (case.kernel, case.name) in wanted:
                        report(f"{case.kernel}: {case.name}")
                        rows += [_row(case, who, where, known) for who in case.runs]
            except Exception as error:  # such as too little memory: the others are run all the same
                rows.append(_entry(*wanted[0], OURS, _state(error), [], Work(0, {}), None))
    if not rows:
        raise ValueError(f"no workload has {only!r} in its name")
    failures = [
        f"{row['kernel']}, {row['workload']}: {row['state']}"
        for row in rows
        if row["implementation"] == OURS and row["state"] != "ok"
    ]
    return {
        "device": name,
        "memory_bytes": torch.cuda.get_device_properties(where).total_memory if where.type == "cuda" else None,
        "card": known._asdict() if known else None,
        "rows": rows,
        "failures": failures,
        "environment": environment,
    }


def _device(device: str) -> torch.device:
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
    if device == "interpreter":
        if not INTERPRETED:
            raise RuntimeError("the interpreter must be chosen before the start: TRITON_INTERPRET=1 spectral-fast ...")
        return torch.device("cpu")
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set, which keeps kernels from the GPU; unset it")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; --device interpreter shows here that the kernels are right")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _forced(backend: str) -> Iterator[None]:
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def _row(case: Case, who: str, device: torch.device, known: Card | None) -> dict[str, Any]:
    """One implementation: what is wrong with it is what its row says, for the others to be run all the same."""
    times: list[float] = []
    try:
        found = case.runs[who]()
        if who == OURS:
            _check_backends(case)
        case.check(who, found)
        del found
        if device.type == "cuda":
            times = milliseconds(case.runs[who], device, ROUNDS, BUDGET_MS)
        state = "ok"
    except Exception as error:  # a compiler's, a library's, or a wrong result: all of them are findings
        state = _state(error)
    bound = known.bound(*case.least) * 1e3 if known else None
    return _entry(case.kernel, case.name, who, state, times, case.least, bound)


def _state(error: Exception) -> str:
    return traceback.format_exc() if os.environ.get("SPECTRAL_FAST_DEBUG") else f"{type(error).__name__}: {error}"


def _entry(
    kernel: str, workload: str, who: str, state: str, times: list[float], least: Work, bound: float | None
) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "workload": workload,
        "implementation": who,
        "state": state,
        "median_ms": median(times) if times else None,
        "min_ms": min(times) if times else None,
        "max_ms": max(times) if times else None,
        "repeats": len(times),
        "bytes": least.nbytes,
        "flops": least.flops,
        "bytes_per_second": least.nbytes / median(times) * 1e3 if times else None,
        "bound_ms": bound,
    }


def _check_backends(case: Case) -> None:
    other = {op: taken for op, taken in chosen_backends().items() if op in case.ops and taken != "gpu"}
    if other:
        raise RuntimeError(f"no gpu backend was taken: {', '.join(f'{op} took {name}' for op, name in other.items())}")


def as_text(result: dict[str, Any]) -> str:
    """The table: times in ms, the ratio to ours, GB/s, and how much of the card's bound is reached."""
    known = result["card"]
    peaks = f"peaks: {known['source']}" if known else "peaks unknown"
    width = max(len(row["implementation"]) for row in result["rows"]) + 2
    lines = [f"{result['device']} ({peaks})"]
    ours: float | None = None
    title = None
    for row in result["rows"]:
        if title != (title := f"{row['kernel']}: {row['workload']}"):
            bound = f", at least {row['bound_ms']:.4f} ms" if row["bound_ms"] else ""
            lines += ["", f"{title}, {row['bytes'] / 1e6:.4g} MB{bound}"]
            lines += [f"  {'':<{width}}{'median ms':>10}{'min':>10}{'× ours':>9}{'GB/s':>8}{'of bound':>10}"]
            ours = row["median_ms"]
        time = row["median_ms"]
        cells = [
            f"{time:.4f}" if time else "-",
            f"{row['min_ms']:.4f}" if time else "-",
            f"{time / ours:.2f}" if time and ours else "-",
            f"{row['bytes_per_second'] / 1e9:.0f}" if time else "-",
            f"{row['bound_ms'] / time:.0%}" if time and row["bound_ms"] else "-",
        ]
        state = "" if row["state"] == "ok" and time else f"  {row['state']}"
        figures = "".join(f"{cell:>{size}}" for cell, size in zip(cells, (10, 10, 9, 8, 10), strict=True))
        lines.append(f"  {row['implementation']:<{width}}{figures}{state}")
    return "\n".join(lines)

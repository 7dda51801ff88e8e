"""The streaming engine beside the one in memory, on a model that fits."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.calibration import Found, check, for_pass, ours
from benchmarks.cases import TINY_LLAMA, Calibration
from benchmarks.samples import examples
from benchmarks.tasks import IN_MEMORY
from benchmarks.workloads import Candidate, Workload
from spectral_fast.adapter import Adapter
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.data import Example
from spectral_fast.calibration.model import load_model
from spectral_fast.calibration.options import DTYPES, ModelOptions
from spectral_fast.calibration.streaming.options import StreamOptions
from spectral_fast.calibration.streaming.skeleton import load_skeleton
from spectral_fast.calibration.streaming.stream import Streamed, streamed

LIMIT = 1e-5  # in float32, where the same products are formed in other orders


def stream_or_memory(case: Calibration, names: Sequence[str]) -> Workload:
    """Sensitivities by streaming from files in the page cache, and from a model in memory that is loaded already.

    Streaming has the default memory for activations. Timed is the calibration; neither the loading of the model in
    memory nor the reading of its description, which is what streaming does in its place.
    """
    files = TemporaryDirectory()
    atexit.register(files.cleanup)
    folder = Path(files.name)
    small = replace(TINY_LLAMA, dtype=case.dtype)
    models.write(case, folder / "case")
    models.write(small, folder / "small")
    samples = examples(case.samples)
    reference = ours(_loaded(case, folder / "case"), samples, 2)

    def run(name: str, model: Any, on: Sequence[Example]) -> Found:
        if name == IN_MEMORY:
            return ours(model, on, 2)
        empty, weights = model
        with TemporaryDirectory() as work:

            def engine(model: nn.Module, adapter: str, modules: Sequence[str]) -> AbstractContextManager[Streamed]:
                budget = StreamOptions(stream=True).budget(torch.device("cpu"))
                return streamed(model, adapter, modules, weights=weights, folder=Path(work), budget=budget)

            found = calibrate(empty, "default", on, batch_size=2, engines=engine)
        return {key: module.samples for key, module in found.modules.items() if module.samples is not None}

    def candidate(name: str) -> Candidate:
        make = _loaded if name == IN_MEMORY else skeleton
        return Candidate(
            name,
            warm_up=partial(run, name, make(small, folder / "small"), samples[:2]),
            run=partial(run, name, make(case, folder / "case"), samples),
            check=lambda found: check(name, found, reference, LIMIT),
        )

    return for_pass(case, samples, map(candidate, names))


def _loaded(case: Calibration, folder: Path) -> Any:
    return load_model(str(folder / "model"), _options(case), Adapter.open(folder / "adapter"))


def skeleton(case: Calibration, folder: Path) -> tuple[Any, Any]:
    """A model of `models.write` without its weights, and what fills them in."""
    return load_skeleton(str(folder / "model"), _options(case), Adapter.open(folder / "adapter"))


def _options(case: Calibration) -> ModelOptions:
    [dtype] = (name for name, dtype in DTYPES.items() if dtype == case.dtype)
    return ModelOptions(dtype=dtype, device="cpu")

"""Calibration split over processes: ``python -m benchmarks.ranks TASK``, alone or under torchrun.

Every process makes the same model and samples, waits for the others, and calibrates with one thread. Timed is from
that wait to g of all samples on rank 0, which prints it.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.cases import Calibration, Task
from benchmarks.models import bounds, peft_model
from benchmarks.samples import examples
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.calibration.ranks import join


def main() -> None:
    """Time one calibration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Task.loads)
    task: Task = parser.parse_args().task
    assert isinstance(task.case, Calibration)
    torch.set_num_threads(1)
    with join(ModelOptions(device="cpu")) as ranks:
        model, samples = peft_model(task.case), examples(task.case.samples)
        calibrate(model, "default", samples[:2], batch_size=2)  # imports, threads and code pages
        ranks.sum({"": torch.zeros(1)})
        start = time.perf_counter()
        found = calibrate(model, "default", samples, batch_size=2, ranks=ranks)
        seconds = time.perf_counter() - start
        if ranks.rank == 0:
            g = [float(x) for module in found.modules.values() for x in module.g]
            print(json.dumps({"seconds": seconds, "g": g, "table": bounds(task.case)}))


if __name__ == "__main__":
    main()

"""What is told while a training runs."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
from transformers import TrainerCallback

from spectral_fast.training.folder import MONITORING

WINDOW, EVERY = 100, 50


class BatchTimeCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the mean time of an optimiser step over the last `window` steps, each `every` steps."""

    def __init__(self, logger: logging.Logger, window: int = WINDOW, every: int = EVERY) -> None:
        self.logger, self.every = logger, every
        self.times: deque[float] = deque(maxlen=window)
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts."""
        self._began = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """The clock stops."""
        self.times.append(time.perf_counter() - self._began)
        if state.global_step % self.every == 0:
            mean = statistics.fmean(self.times)
            self.logger.info("step %d: %.3f s per step, mean of the last %d", state.global_step, mean, len(self.times))


class LogCallback(TrainerCallback):  # type: ignore[misc]
    """Logs what the trainer logs: losses, learning rate, norm of the gradient."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, Any], **___: Any) -> None:
        """A line of JSON per entry."""
        self.logger.info("step %d: %s", state.global_step, json.dumps(logs))


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows how many steps are done by a `progress.counter`, which stays open until the stack is left."""

    def __init__(self, counter: Any, stack: ExitStack) -> None:
        self.counter, self.stack = counter, stack

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """The number of steps is known now; a resumed run has some of them behind it."""
        self.advance = self.stack.enter_context(self.counter("train", state.max_steps)) or (lambda _: None)
        self.advance(state.global_step)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """One more."""
        self.advance(1)


class SystemMonitor:
    """Writes the use of processor, memory and NVIDIA GPUs to system_monitoring/usage.jsonl, once per `interval`.

    To be used as a context: a thread watches within it.
    """

    def __init__(self, output_dir: Path, interval: float = 1.0) -> None:
        self.file, self.interval = output_dir / MONITORING / "usage.jsonl", interval

    def __enter__(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._ended = Event()
        self._thread = Thread(target=self._watch, name="system monitor", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        process, gpus = psutil.Process(), _gpus()
        psutil.cpu_percent()
        process.cpu_percent()
        with self.file.open("a", encoding="utf-8") as file:
            ended = False
            while not ended:
                ended = self._ended.wait(self.interval)
                row = {
                    "time": round(time.time(), 3),
                    "cpu_percent": psutil.cpu_percent(),
                    "memory_percent": psutil.virtual_memory().percent,
                    "process_cpu_percent": process.cpu_percent(),
                    "process_memory_bytes": process.memory_info().rss,
                    "gpus": [_usage(gpu) for gpu in gpus],
                }
                print(json.dumps(row), file=file, flush=True)


def _gpus() -> list[Any]:
    """NVIDIA's handles, where its library is installed and finds any."""
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return []


def _usage(gpu: Any) -> dict[str, Any]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    return {
        "gpu_percent": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_bytes": memory.used,
        "memory_total_bytes": memory.total,
    }

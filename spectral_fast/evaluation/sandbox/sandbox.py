"""The evaluator's side of the sandbox: workers that run programs against their tests."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from spectral_fast.evaluation.sandbox import kernel
from spectral_fast.evaluation.sandbox.confine import Limits
from spectral_fast.evaluation.sandbox.worker import Worker


@dataclass(frozen=True)
class Program:
    """A generated program and the tests of its function.

    Attributes:
        source: the program, hostile.
        entry_point: name of its function.
        helpers: source that the tests build upon; they never see what the program defines.
        test: source with a function `check(candidate)`.
    """

    source: str
    entry_point: str
    helpers: str
    test: str


@dataclass(frozen=True)
class Outcome:
    """What became of a program: `verdict` is "passed", "failed" or "timed out", `detail` says why."""

    verdict: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether all tests passed."""
        return self.verdict == "passed"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail}" if self.detail else self.verdict


class Sandbox:
    """Runs programs in processes that can do no harm; a context manager. See the package for what is guaranteed.

    Args:
        workers: programs that run at the same time.
        limits: of each.
        isolation: one of `confine.WAYS`; None takes the first that is allowed here.

    Raises:
        RuntimeError: this machine allows none of them, or not the one that is asked for.
    """

    def __init__(self, workers: int = 1, limits: Limits | None = None, isolation: str | None = None) -> None:
        if workers < 1:
            raise ValueError(f"a sandbox needs at least 1 worker; got {workers}")
        if not kernel.supported():
            raise RuntimeError("generated code runs only on Linux on x86-64 or 64-bit Arm, where it can be confined")
        self.limits = limits or Limits()
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers: list[Worker] = []
        try:
            for _ in range(workers):
                worker = Worker(isolation)
                self._workers.append(worker)
                self._free.put(worker)
        except BaseException:
            self.close()
            raise

    @property
    def isolation(self) -> str:
        """The isolation that holds."""
        return self._workers[0].isolation

    def run(self, program: Program) -> Outcome:
        """Run one program against its tests.

        Raises:
            RuntimeError: the tests do not run at all, or the sandbox is broken; no verdict on the program.
        """
        worker = self._free.get()
        try:
            first = {"source": program.source, "entry_point": program.entry_point, "limits": vars(self.limits)}
            answer = worker.ask(first, {"helpers": program.helpers, "test": program.test}, self.limits.seconds)
        finally:
            self._free.put(worker)
        detail = answer["detail"].encode("utf-8", "backslashreplace").decode()  # it may have lone surrogates
        outcome = Outcome(answer["verdict"], detail)
        if outcome.verdict == "error":
            raise RuntimeError(f"no verdict on a program with {program.entry_point}: {outcome.detail}")
        return outcome

    def run_all(self, programs: Sequence[Program]) -> list[Outcome]:
        """Run many programs, as many at a time as there are workers; outcomes in their order.

        Raises:
            RuntimeError: as `run`; the programs that have not started are left out.
        """
        with ThreadPoolExecutor(len(self._workers)) as pool:
            return list(pool.map(self.run, programs))

    def close(self) -> None:
        """End the workers; nothing of them is left."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

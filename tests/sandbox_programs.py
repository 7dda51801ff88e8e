"""What the tests of the sandbox share: programs, and what is known of its processes."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from spectral_fast.evaluation.sandbox.confine import Limits
from spectral_fast.evaluation.sandbox.sandbox import Outcome, Program, Sandbox

PATIENT = Limits(seconds=60.0, memory_mb=384)
HASTY = Limits(seconds=0.4)


def opened(way: str, limits: Limits) -> Sandbox:
    try:
        return Sandbox(limits=limits, isolation=way)
    except RuntimeError as error:
        pytest.skip(f"not allowed here: {error}")


def program(source: str, test: str = "assert candidate() == 'right'") -> Program:
    check = f"def check(candidate):\n{textwrap.indent(textwrap.dedent(test), '    ')}\n"
    return Program(textwrap.dedent(source), "f", "def f():\n    'A prompt.'\n", check)


def run(sandbox: Sandbox, source: str, test: str = "assert candidate() == 'right'") -> Outcome:
    return sandbox.run(program(source, test))


def processes_below(pid: int) -> list[int]:
    """Living and dead descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    below, found = {pid}, []
    while below:
        below = {child for child, parent in parents.items() if parent in below}
        found += below
    return found


def has_memory(pid: int) -> bool:
    """Whether it lives: of the dead that nobody has waited for, no memory is left."""
    try:
        return not Path(f"/proc/{pid}/statm").read_text().startswith("0 ")
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers(sandbox: Sandbox) -> list[int]:
    return [worker._process.pid for worker in sandbox._workers]


def seen(sandbox: Sandbox, source: str) -> object:
    """What the program's function returns."""
    outcome = run(sandbox, source, "raise ValueError(repr(candidate()))")
    kind, _, text = outcome.detail.partition(": ")
    assert kind == "ValueError", outcome
    return ast.literal_eval(text)


def attempts(sandbox: Sandbox, *lines: str) -> list[str]:
    """Those of the lines that run without an exception."""
    source = f"""
        def f():
            done = []
            for line in {list(lines)!r}:
                try:
                    exec(line, {{}})
                    done.append(line)
                except BaseException as error:
                    pass
            return done
    """
    done = seen(sandbox, source)
    assert isinstance(done, list)
    return done

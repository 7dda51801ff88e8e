"""What the sandbox leaves behind: nothing, whoever dies; and that all of it holds for an ordinary user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ordinary_user
import pytest
from sandbox_programs import HASTY, PATIENT, has_memory, opened, processes_below, program, run, workers

import spectral_fast
from spectral_fast.evaluation.sandbox import kernel
from spectral_fast.evaluation.sandbox.confine import WAYS, Limits
from spectral_fast.evaluation.sandbox.sandbox import Sandbox


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_it_is_left(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the system's has the sandboxes of other runs, too
    mounts = Path("/proc/self/mounts").read_text()
    with opened(way, HASTY) as sandbox:
        run(sandbox, "open('x', 'w').write('x')\ndef f():\n    while True: pass")
        pids = workers(sandbox)
        assert list(tmp_path.iterdir())
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert Path("/proc/self/mounts").read_text() == mounts
    assert not list(tmp_path.iterdir())


def test_nothing_of_it_is_left_by_an_evaluator_that_was_killed(tmp_path: Path) -> None:
    code = "import os, signal\nfrom spectral_fast.evaluation.sandbox.sandbox import Sandbox\n"
    code += "sandbox = Sandbox(2)\nos.kill(os.getpid(), signal.SIGKILL)"
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(spectral_fast.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    began = time.monotonic()
    while list(tmp_path.iterdir()):
        assert time.monotonic() - began < 30


def test_a_lost_worker_is_an_error_and_no_verdict() -> None:
    with Sandbox(limits=HASTY) as sandbox:
        os.kill(workers(sandbox)[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="a worker of the sandbox has failed"):
            run(sandbox, "def f(): return 'right'")


@pytest.mark.parametrize("way", WAYS)
def test_a_program_dies_with_its_worker(way: str) -> None:
    with opened(way, PATIENT) as sandbox, ThreadPoolExecutor(1) as pool:
        [worker] = workers(sandbox)
        pending = pool.submit(run, sandbox, "while True: pass")
        began = time.monotonic()
        while len(below := processes_below(worker)) < 3:  # the supervisor, the tests and the program
            assert time.monotonic() - began < 30
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="a worker of the sandbox has failed"):
            pending.result()
        while any(map(has_memory, below)):
            assert time.monotonic() - began < 30


def test_programs_run_at_the_same_time_give_outcomes_in_their_order() -> None:
    programs = [program(f"def f(): return {'right' if i % 3 else 'wrong'!r}") for i in range(12)]
    with Sandbox(workers=3, limits=PATIENT) as sandbox:
        outcomes = sandbox.run_all(programs)
    assert [outcome.passed for outcome in outcomes] == [bool(i % 3) for i in range(12)]


def test_it_refuses_where_it_cannot_confine(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="isolation must be one of"):
        Sandbox(isolation="none")
    with pytest.raises(ValueError, match="the limit seconds must be more than 0"):
        Limits(seconds=0)
    monkeypatch.setattr(kernel.platform, "system", lambda: "Darwin")
    with pytest.raises(RuntimeError, match="only on Linux"):
        Sandbox()


def test_all_of_this_holds_for_an_ordinary_user() -> None:
    repository = Path(spectral_fast.__file__).parents[1]
    files = sorted(Path(__file__).parent.glob("test_sandbox*.py"))
    base, environment = Path(sys.base_prefix).resolve(), Path(sys.prefix)
    pytest_run = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        *map(str, files),
    ]
    script = ordinary_user.command(*pytest_run, reachable=[base, environment, repository])
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o777)
        env = os.environ | {"HOME": home, "TMPDIR": home, "PYTHONPATH": str(repository)}
        done = subprocess.run(script, cwd=repository, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

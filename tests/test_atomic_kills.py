"""Runs that are killed, or that meet: the directory is wholly the old one or wholly the new one."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from atomic_tools import leftovers, python, refused, tree

from spectral_fast.atomic import replace_directory


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# A process is forked that replaces the directory, and is killed: at the n-th thing it does to the file system
# (an audit hook sees each), for every n; and at random times. The script prints how often it saw what.
KILLS = """
import random, shutil, signal, time

root, overwrite, kills = Path(sys.argv[1]), sys.argv[2] == "overwrite", int(sys.argv[3])
out, source = root / "out", root / "source"
NAMES = ["config", "weights", "sub/a", "sub/b"]
WATCHED = "open os.mkdir os.rename os.rmdir os.remove os.scandir os.listdir ctypes.dlsym".split()

def fill(folder, word):
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        with open(folder / name, "wb", buffering=0) as file:
            for _ in range(4):
                file.write(word * 4096)

def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def run(at_event=None):
    pid = os.fork()
    if pid:
        return pid
    left = at_event
    def hook(event, _):
        nonlocal left
        if left is not None and event in WATCHED:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    with replace_directory(out, overwrite=overwrite, source=source) as new:
        fill(new, b"new")
    os._exit(0)

def reset():
    for path in (out, root / ".out.partial"):
        shutil.rmtree(path, ignore_errors=True)
    if overwrite:
        fill(out, b"old")

fill(source, b"src")
original = tree(source)
durations = []
for _ in range(5):
    reset()
    began = time.perf_counter()
    os.waitpid(run(), 0)
    durations.append(time.perf_counter() - began)
new = tree(out)
reset()
old = tree(out) if overwrite else None
assert new != old and len(new) == 4
seen = {"old": 0, "new": 0, "finished": 0, "leftover": 0}

def judge(status):
    state = tree(out) if out.exists() else None
    assert state in (old, new), "half of a directory"
    seen["new" if state == new else "old"] += 1
    seen["finished"] += status == 0
    seen["leftover"] += (root / ".out.partial").exists()
    assert tree(source) == original
    if overwrite or state is None:
        _, status = os.waitpid(run(), 0)
        assert status == 0 and tree(out) == new, "the next run failed"
        assert not (root / ".out.partial").exists()

event, status = 0, None
while status != 0:
    reset()
    _, status = os.waitpid(run(at_event=event), 0)
    judge(status)
    event += 1
random.seed(0)
tries = 0
while kills:
    tries += 1
    assert tries < 1000, "the runs end before they can be killed"
    reset()
    pid = run()
    time.sleep(random.random() * min(durations))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    judge(status)
    kills -= status != 0
print(event + tries, seen["old"], seen["new"], seen["finished"], seen["leftover"])
"""


@pytest.mark.parametrize("case", ["fresh", "overwrite"])
def test_a_killed_run_leaves_all_of_the_old_or_all_of_the_new(tmp_path: Path, case: str) -> None:
    result = subprocess.run(python(KILLS, str(tmp_path), case, "40"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    runs, old, new, finished, leftover = map(int, result.stdout.split())
    assert old + new == runs
    # The kills hit before the result was published and after it, and left something to clean up.
    assert old > 10
    assert new > finished
    assert runs - finished > 40
    assert leftover > 10


@pytest.mark.parametrize("successor", [False, True], ids=["gone", "taken"])
def test_a_lock_that_its_holder_removed_meanwhile_is_not_mistaken_for_ones_own(
    out: Path, monkeypatch: pytest.MonkeyPatch, successor: bool
) -> None:
    flock, work = fcntl.flock, out.with_name(".out.partial")

    def first_the_holder_ends(lock: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(work)
        if successor:
            work.mkdir()
            other = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
            flock(other, operation)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", first_the_holder_ends)
    if successor:
        refused(out, RuntimeError, "another run is writing")
        assert leftovers(out) == [work.name]
    else:
        with replace_directory(out) as new:
            (new / "x").touch()
        assert tree(out) == {"x": b""}


def test_a_successor_that_takes_the_lock_at_the_last_moment_keeps_it(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmdir, work = Path.rmdir, out.with_name(".out.partial")

    def first_the_successor_begins(path: Path) -> None:
        if path == work:
            (work / "lock").touch()
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", first_the_successor_begins)
    with replace_directory(out) as new:
        (new / "x").touch()
    assert tree(out) == {"x": b""}
    assert (work / "lock").exists()


def test_many_processes_at_once_leave_one_complete_result(tmp_path: Path) -> None:
    script = """
    out, word = Path(sys.argv[1]), sys.argv[2]
    done = 0
    for _ in range(20):
        try:
            with replace_directory(out, overwrite=True) as new:
                for name in "abcd":
                    (new / name).write_text(word)
            done += 1
        except RuntimeError as error:
            assert "another run" in str(error), error
    print(done)
    """
    children = [
        subprocess.Popen(
            python(script, str(tmp_path / "out"), word), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for word in ("one", "two", "three")
    ]
    results = [child.communicate() for child in children]
    assert all(child.returncode == 0 for child in children), results
    assert sum(int(output) for output, _ in results) > 0
    final = tree(tmp_path / "out")
    assert set(final) == set("abcd")
    assert len(set(final.values())) == 1
    assert leftovers(tmp_path / "out") == []

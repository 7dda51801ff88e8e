"""A replaced directory is wholly old or wholly new, whenever the process is killed and whatever fails."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from spectral_fast import atomic
from spectral_fast.atomic import replace_directory


def tree(directory: Path) -> dict[str, bytes]:
    """Relative path -> content of every file."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def fill(directory: Path, word: str) -> dict[str, bytes]:
    (directory / "sub").mkdir(parents=True)
    for name in ("config.json", "weights", "sub/note"):
        (directory / name).write_text(word * 1000)
    return tree(directory)


# What the scripts below begin with: the module alone, since the package takes seconds to import.
LOAD = f"""
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", {atomic.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
replace_directory = module.replace_directory
os.fsync = lambda entry: None  # a killed process loses nothing that the kernel has
"""


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", LOAD + textwrap.dedent(script), *arguments]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith("."))


def test_the_directory_appears_complete_when_the_block_ends(out: Path) -> None:
    with replace_directory(out) as new:
        expected = fill(new, "new")
        assert not out.exists()
        assert new.stat().st_dev == out.parent.stat().st_dev
    assert tree(out) == expected
    assert leftovers(out) == []


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with replace_directory(tmp_path / "a" / "b" / "out") as new:
        (new / "x").touch()
    assert (tmp_path / "a" / "b" / "out" / "x").exists()


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replace_directory("out") as new:
        (new / "x").touch()
    assert (tmp_path / "out" / "x").exists()


def test_an_empty_directory_may_be_filled_without_overwrite(out: Path) -> None:
    out.mkdir()
    with replace_directory(out) as new:
        expected = fill(new, "new")
    assert tree(out) == expected


def test_overwrite_replaces_everything_that_was_there(out: Path) -> None:
    fill(out, "old")
    (out / "only-old").touch()
    with replace_directory(out, overwrite=True) as new:
        expected = fill(new, "new")
        assert (out / "only-old").exists()
    assert tree(out) == expected
    assert leftovers(out) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_block_leaves_everything_as_it_was(out: Path, error: type[BaseException], overwrite: bool) -> None:
    before = fill(out, "old") if overwrite else None
    with pytest.raises(error), replace_directory(out, overwrite=overwrite) as new:  # noqa: PT012
        fill(new, "new")
        raise error
    assert (tree(out) if out.exists() else None) == before
    assert leftovers(out) == []


def refused(out: Path | str, kind: type[BaseException], message: str, **options: Any) -> None:
    with pytest.raises(kind, match=message), replace_directory(out, **options):
        pytest.fail("work began")


def test_a_directory_that_is_not_empty_is_kept(out: Path) -> None:
    before = fill(out, "old")
    refused(out, FileExistsError, r"not empty.*--overwrite.*out")
    assert tree(out) == before


def test_overwrite_spares_a_directory_without_the_marker(out: Path) -> None:
    before = fill(out, "old")
    refused(out, FileExistsError, r"it has no adapter\.json", overwrite=True, marker="adapter.json")
    assert tree(out) == before
    with replace_directory(out, overwrite=True, marker="config.json") as new:
        (new / "x").touch()
    assert tree(out) == {"x": b""}


def test_out_dir_and_source_must_be_apart(tmp_path: Path) -> None:
    source = tmp_path / "a" / "source"
    fill(source, "source")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = tree(tmp_path)
    for path in (
        source,
        source / "in",
        source / "in" / "deeper",
        tmp_path / "a",
        tmp_path,
        source / ".." / "source",
    ):
        refused(path, ValueError, "must not contain each other", source=source, overwrite=True)
    refused(tmp_path / "link" / "source", ValueError, "must not contain each other", source=source, overwrite=True)
    refused(source, ValueError, "must not contain", source=tmp_path / "link" / "source", overwrite=True)
    assert tree(tmp_path) == before
    with replace_directory(tmp_path / "a" / "source-2", source=source):
        pass


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_symbolic_link_is_refused(tmp_path: Path, out: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    out.symlink_to(tmp_path / target)
    refused(out, ValueError, f"symbolic link to .*{target}", overwrite=True)
    assert out.is_symlink()


def test_a_file_is_refused(out: Path) -> None:
    out.write_text("precious")
    refused(out, NotADirectoryError, "out_dir is a file", overwrite=True)
    assert out.read_text() == "precious"


def test_a_file_in_the_way_of_a_parent_is_named(out: Path) -> None:
    out.write_text("precious")
    refused(out / "deeper", OSError, str(out))
    assert out.read_text() == "precious"


def test_a_mount_point_is_refused() -> None:
    refused("/proc", ValueError, "mount point", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(tmp_path / "locked" / "out", PermissionError, "locked")


def test_without_exchange_overwrite_is_refused_before_any_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(a: Path, b: Path) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(a), None, str(b))

    before = fill(out, "old")
    monkeypatch.setattr(atomic, "_exchange", unsupported)
    refused(out, RuntimeError, "exchange two directories in one step.*Invalid argument", overwrite=True)
    assert tree(out) == before
    assert leftovers(out) == []
    with replace_directory(out.with_name("fresh"), overwrite=True) as new:
        (new / "x").touch()


def test_a_second_run_to_the_same_place_is_refused_and_the_first_is_not_disturbed(out: Path) -> None:
    with replace_directory(out) as new:
        expected = fill(new, "new")
        refused(out, RuntimeError, "another run is writing to .*out")
        with replace_directory(out.with_name("sibling")) as other:
            (other / "x").touch()
    assert tree(out) == expected


def test_what_another_process_left_behind_is_removed(out: Path) -> None:
    script = """
    with replace_directory(sys.argv[1]) as new:
        (new / "half").write_text("half")
        os.kill(os.getpid(), 9)
    """
    assert subprocess.run(python(script, str(out))).returncode == -9
    assert leftovers(out) == [".out.partial"]
    with replace_directory(out) as new:
        assert list(new.iterdir()) == []
        (new / "x").touch()
    assert tree(out) == {"x": b""}
    assert leftovers(out) == []


def test_a_directory_that_someone_else_fills_meanwhile_is_kept(out: Path) -> None:
    with pytest.raises(OSError, match="not empty"), replace_directory(out):  # noqa: PT012
        out.mkdir()
        (out / "theirs").touch()
    assert tree(out) == {"theirs": b""}
    assert leftovers(out) == []


def test_files_and_directories_are_on_disk_before_they_are_published(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(out, "old")
    synced: set[int] = set()
    wanted: set[int] = set()
    fsync, exchange = os.fsync, atomic._exchange

    def note(entry: int) -> None:
        synced.add(os.fstat(entry).st_ino)
        fsync(entry)

    def check(a: Path, b: Path) -> None:
        if b == out:
            wanted.update(p.stat().st_ino for p in (a, *a.rglob("*")))
            assert wanted <= synced
            synced.clear()
        exchange(a, b)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(atomic, "_exchange", check)
    with replace_directory(out, overwrite=True) as new:
        fill(new, "new")
    assert len(wanted) == 5
    assert out.parent.stat().st_ino in synced


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

"""A replaced directory is wholly old or wholly new, whenever the process is killed and whatever fails."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from atomic_tools import fill, leftovers, python, refused, tree

from spectral_fast import atomic
from spectral_fast.atomic import replace_directory


# What the scripts below begin with: the module alone, since the package takes seconds to import.
@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


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
    refused(out / "deeper", NotADirectoryError, f"{out} is a file, and cannot hold the folder")
    assert out.read_text() == "precious"


def test_a_mount_point_is_refused() -> None:
    refused("/proc", ValueError, "mount point", overwrite=True)


@pytest.mark.parametrize("name", ["/proc/out", "/proc/no_home/out"])
def test_a_place_for_no_folders_is_told_by_the_name_that_was_given(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no folder can be made in") as refusal, replace_directory(name):
        pass
    assert refusal.value.filename == name


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

"""Replace a directory in one step: at every moment it is wholly the old one or wholly the new one.

Everything happens in `.{name}.partial` beside the directory: the new one grows there, under a lock, and a
rename publishes it. Where something is to be replaced, the two change places (renameat2 with RENAME_EXCHANGE)
and the old one is deleted afterwards. What a killed run leaves behind, the next run removes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK, _NEW = "lock", "new"


@contextmanager
def replace_directory(
    out_dir: Path | str, *, overwrite: bool = False, source: Path | None = None, marker: str | None = None
) -> Iterator[Path]:
    """Give an empty directory to fill; if the block ends well it becomes `out_dir`, else nothing changes.

    Args:
        out_dir: where the result shall be; missing parents are made. Missing or empty, unless `overwrite`.
        overwrite: replace a directory that is not empty.
        source: a directory that is read meanwhile, which `out_dir` must not touch.
        marker: a file that a directory must have to be overwritten, lest a slip delete something else.

    Yields:
        The directory to fill, on the file system of `out_dir`.

    Raises:
        FileExistsError: `out_dir` is not empty and may not be overwritten.
        ValueError: `out_dir` is a symbolic link, a mount point, or overlaps with `source`.
        RuntimeError: another run is writing to `out_dir`, or its file system cannot exchange directories.
        OSError: from the file system; with the name of `out_dir` where no folder can be made there.
    """
    out = check_out_dir(out_dir, overwrite=overwrite, source=source, marker=marker)
    work = out.with_name(f".{out.name}.partial")
    lock = _lock(work, out)
    try:
        _clear(work)
        if overwrite and _occupied(out):
            _require_exchange(work)
        new = work / _NEW
        new.mkdir()
        yield new
        _sync(new)
        _publish(new, out, overwrite)
    finally:
        _clear(work)
        _unlock(work, lock)


def check_out_dir(
    out_dir: Path | str, *, overwrite: bool = False, source: Path | None = None, marker: str | None = None
) -> Path:
    """The absolute `out_dir`, if `replace_directory` would take it: to be asked before long work.

    Raises:
        As `replace_directory` for what can be known beforehand.
    """
    path = Path(out_dir)
    if path.is_symlink():
        raise ValueError(f"out_dir {path} is a symbolic link to {path.readlink()}; give the directory itself")
    out = path.resolve()
    if source is not None:
        origin = source.resolve()
        if out == origin or out in origin.parents or origin in out.parents:
            raise ValueError(
                f"out_dir {out} and the source {origin} must not contain each other; choose another out_dir"
            )
    check_parents(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "out_dir is a file; choose another one", str(out))
    if os.path.ismount(out):
        raise ValueError(f"out_dir {out} is a mount point, which cannot be replaced; choose a folder in it")
    if _occupied(out):
        if not overwrite:
            raise FileExistsError(errno.EEXIST, "out_dir is not empty; choose another one, or --overwrite", str(out))
        if marker is not None and not (out / marker).exists():
            raise FileExistsError(
                errno.EEXIST,
                f"out_dir is not overwritten: it has no {marker}, so it is something else",
                str(out),
            )
    return out


def check_parents(path: Path) -> None:
    """Refuses a folder that could only be inside a file.

    Raises:
        NotADirectoryError: naming both.
    """
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file, and cannot hold the folder {path}; choose another one")


def replace_file(path: Path, text: str) -> None:
    """Write a text file in one step: at every moment it is wholly the old one or wholly the new one.

    Characters that UTF-8 lacks (a path may hold bytes that are no text) are written as escapes.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _lock(work: Path, out: Path) -> int:
    """Make `work` and hold its lock file; the kernel lets go of it however this process ends."""
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # the user knows nothing of `work`
            reason = f"no folder can be made in {out.parent} ({error.strerror}); choose another out_dir"
            raise type(error)(error.errno, reason, str(out)) from error
        try:
            lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the run that had it ended just now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), (work / _LOCK).stat()):
                return lock
            os.close(lock)
        except FileNotFoundError:
            os.close(lock)
        except BlockingIOError as error:
            os.close(lock)
            raise RuntimeError(
                f"another run is writing to {out} (it holds {work / _LOCK}); wait for it to end"
            ) from error
        except OSError as error:
            os.close(lock)
            raise RuntimeError(f"cannot lock {work / _LOCK}: {error.strerror}; choose another file system") from error


def _unlock(work: Path, lock: int) -> None:
    (work / _LOCK).unlink()
    try:
        work.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # the next run has already made its own lock there: leave it the directory
            raise
    finally:
        os.close(lock)


def _clear(work: Path) -> None:
    for entry in work.iterdir():
        if entry.name != _LOCK:
            shutil.rmtree(entry)


def _occupied(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _require_exchange(work: Path) -> None:
    pair = work / "a", work / "b"
    for directory in pair:
        directory.mkdir()
    try:
        _exchange(*pair)
    except OSError as error:
        raise RuntimeError(
            f"--overwrite needs a file system that can exchange two directories in one step; that of "
            f"{work.parent} cannot ({error.strerror}): choose a new out_dir, or remove the old one first"
        ) from error
    for directory in pair:
        directory.rmdir()


def _publish(new: Path, out: Path, overwrite: bool) -> None:
    try:
        new.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not overwrite:
            raise
        _exchange(new, out)
    sync_entry(out.parent)


def _exchange(a: Path, b: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if hasattr(libc, "renameat2"):
        at_fdcwd, rename_exchange = -100, 2
        failed = libc.renameat2(at_fdcwd, names[0], at_fdcwd, names[1], rename_exchange)
    elif hasattr(libc, "renamex_np"):
        rename_swap = 2
        failed = libc.renamex_np(*names, rename_swap)
    else:
        raise OSError(errno.ENOSYS, "this C library has neither renameat2 nor renamex_np", str(a), None, str(b))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def _sync(directory: Path) -> None:
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync_entry(Path(folder, name))
        sync_entry(Path(folder))


def sync_entry(path: Path) -> None:
    """Wait until a file or a directory is on the disk as it is."""
    entry = os.open(path, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)

"""Runs a command as an ordinary user, in a private mount namespace where that user can reach this interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from spectral_fast.evaluation.sandbox import kernel

NOBODY = 65534


def command(*argv: str, reachable: list[Path]) -> list[str]:
    """The command line that does it; skips where root may not make a mount namespace."""
    if os.geteuid() != 0:
        pytest.skip("this run is an ordinary user's already")
    child = os.fork()
    if child == 0:
        try:
            kernel.unshare(kernel.NEW_MOUNTS)
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        pytest.skip("root may not make a mount namespace here, so an ordinary user may not reach this interpreter")
    return [sys.executable, __file__, os.pathsep.join(map(str, reachable)), *argv]


def _closed(path: Path) -> Path | None:
    """The outermost directory above a path that others may not pass."""
    return next((parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001), None)


def _open(path: Path) -> None:
    """Put an empty directory, open to all, over a closed one, with only `path` in it."""
    closed = _closed(path)
    if closed is None:
        return
    held = os.open(path, os.O_PATH)
    kernel.mount("tmpfs", str(closed), "tmpfs", 0, "mode=0755,size=1m")
    path.mkdir(parents=True)
    kernel.mount(f"/proc/self/fd/{held}", str(path), "", kernel.BIND | kernel.RECURSIVE)
    os.close(held)


def main() -> None:
    """Become the user, and the command."""
    kernel.unshare(kernel.NEW_MOUNTS)
    kernel.mount("", "/", "", kernel.RECURSIVE | kernel.PRIVATE)
    for path in sys.argv[1].split(os.pathsep):
        _open(Path(path))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()

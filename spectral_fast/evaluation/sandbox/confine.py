"""Takes from a process all that a generated program must not have, by namespaces or by Landlock; see the package."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import kernel

PRIVILEGED, ORDINARY, LANDLOCK = "namespaces", "user namespaces", "landlock"
WAYS = (PRIVILEGED, ORDINARY, LANDLOCK)

_SCRATCH, _PACKAGES, _INODES = "/scratch", "/packages", 1024
FIRST_USER = 2_000_000_000  # plus the supervisor's process id: a user whom no real one, and no other program, shares


@dataclass(frozen=True)
class View:
    """What a program may see of the machine.

    Attributes:
        libraries: directories and files that it may read, at their own paths.
        hidden: directories among them that it may not.
        packages: directories of importable packages, besides the standard library, and of their libraries.
        work: an empty directory for mounts, with `scratch` and `packages`, the links to `packages`, in it.
    """

    libraries: Sequence[str]
    hidden: Sequence[str]
    packages: Sequence[str]
    work: str


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall time from its start to the end of its tests.
        memory_mb: address space of the program, and as much again of its tests.
        file_mb: each file, and all files together.
        open_files: descriptors.
    """

    seconds: float = 3.0
    memory_mb: int = 1024
    file_mb: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"the limit {name} must be more than 0; got {value}")


def enter(way: str, view: View, limits: Limits, program_user: int) -> None:
    """The supervisor's part: new namespaces and a new root for the processes that it forks.

    Args:
        way: one of `WAYS`.
        view: what shall be in the root.
        limits: of the program.
        program_user: who the program will run as, if `way` is PRIVILEGED.

    Raises:
        OSError: this way is not allowed here.
    """
    if way == LANDLOCK:
        if not kernel.landlock_version():
            raise OSError("the kernel has no Landlock")
        return
    spaces = kernel.NEW_MOUNTS | kernel.NEW_PIDS | kernel.NEW_NETWORK | kernel.NEW_IPC
    user, group = os.geteuid(), os.getegid()
    if way == ORDINARY:
        kernel.unshare(spaces | kernel.NEW_USER)
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(line)
    else:
        kernel.unshare(spaces)
    kernel.mount("", "/", "", kernel.RECURSIVE | kernel.PRIVATE)
    root = view.work
    kernel.mount("tmpfs", root, "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, "size=1m,mode=0755")
    for path in view.libraries:
        _bind(path, root + path)
    for path in view.hidden:
        kernel.mount("tmpfs", root + path, "tmpfs", kernel.READ_ONLY, "size=4k,mode=0755")
    for path in view.packages:
        _bind(path, f"{root}{_PACKAGES}/{Path(path).name}")
    Path(root + _PACKAGES).mkdir(exist_ok=True)
    Path(root + _SCRATCH).mkdir()
    owner = f"uid={program_user},gid={program_user}," if way == PRIVILEGED else ""
    space = f"{owner}mode=0700,size={limits.file_mb}m,nr_inodes={_INODES}"
    kernel.mount("tmpfs", root + _SCRATCH, "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, space)
    kernel.make_read_only(root, recursive=False)
    kernel.change_root(root)


def confine(way: str, view: View, limits: Limits, program_user: int, keep: Sequence[int]) -> str:
    """The forked process's part: it keeps these descriptors, and no rights; for good.

    Args:
        way: the one that was entered.
        view: the same as for `enter`.
        limits: the same as for `enter`.
        program_user: the same as for `enter`.
        keep: descriptors that stay open; the last one, of /dev/null, becomes 0, 1 and 2.

    Returns:
        Where it finds packages.

    Raises:
        OSError: this way is not allowed here.
    """
    null = keep[-1]
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    _close_all_but(keep[:-1])
    mebi = 1 << 20
    for limit, value in (
        (resource.RLIMIT_CPU, int(limits.seconds) + 2),
        (resource.RLIMIT_FSIZE, limits.file_mb * mebi),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_AS, limits.memory_mb * mebi),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, most))
    if way == PRIVILEGED:
        os.setgroups([])
        os.setresgid(program_user, program_user, program_user)
        os.setresuid(program_user, program_user, program_user)
    scratch = _SCRATCH if way != LANDLOCK else f"{view.work}{_SCRATCH}"
    packages = _PACKAGES if way != LANDLOCK else f"{view.work}{_PACKAGES}"
    os.chdir(scratch)
    os.environ.update(HOME=scratch, TMPDIR=scratch)
    kernel.drop_capabilities()
    kernel.die_with_parent(signal.SIGKILL)
    kernel.forbid_tracing()
    if way == LANDLOCK:
        libraries = [str(Path(path).resolve()) for path in view.libraries]  # /lib may be a name of /usr/lib
        readable = [*_without(libraries, view.hidden), *view.packages]
        folders = [path for path in libraries if Path(path).is_dir()]
        kernel.landlock(readable, [*folders, *view.packages, packages, scratch])
    kernel.filter_system_calls()
    return packages


def _bind(source: str, target: str) -> None:
    origin, place = Path(source), Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    if origin.is_symlink():
        place.symlink_to(origin.readlink())
        return
    if origin.is_dir():
        place.mkdir(exist_ok=True)
    else:
        place.touch()
    kernel.mount(source, target, "", kernel.BIND | kernel.RECURSIVE)
    kernel.make_read_only(target, recursive=True)


def _without(paths: Sequence[str], hidden: Sequence[str]) -> Iterator[str]:
    """The paths, in pieces where something below is hidden: Landlock cannot take back what it has given."""
    for path in paths:
        below = [h for h in hidden if h.startswith(path + "/")]
        if path in hidden:
            continue
        if below:
            yield from _without([entry.path for entry in os.scandir(path) if not entry.is_symlink()], below)
        else:
            yield path


def _close_all_but(keep: Sequence[int]) -> None:
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0])

"""The system calls behind the sandbox that Python has no function for."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)

NEW_USER, NEW_MOUNTS, NEW_PIDS, NEW_NETWORK, NEW_IPC = 0x10000000, 0x20000, 0x20000000, 0x40000000, 0x8000000
READ_ONLY, NO_SUID, NO_DEVICES, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_DETACH = 2
_NO_NEW_PRIVILEGES, _PARENT_DEATH_SIGNAL, _SECCOMP, _FILTER, _DUMPABLE = 38, 1, 22, 2, 4
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446

# Refused system calls: name, number on x86-64, number on 64-bit Arm (None where it has none).
# Processes and threads; programs; other processes; sockets; memory beyond RLIMIT_AS; privileges and mounts; limits and
# scheduling; attributes of files, which Landlock leaves free.
_REFUSED = """
fork 57 -, vfork 58 -, clone 56 220, clone3 435 435, execve 59 221, execveat 322 281,
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, kcmp 312 272,
kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
pidfd_open 434 434, pidfd_send_signal 424 424, pidfd_getfd 438 438,
socket 41 198, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
memfd_create 319 279, memfd_secret 447 447, shmget 29 194, msgget 68 186, semget 64 190, mq_open 240 180,
bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, prctl 157 167, seccomp 317 277, personality 135 92,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, mount_setattr 442 442,
open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433,
keyctl 250 219, add_key 248 217, request_key 249 218, quotactl 179 60, quotactl_fd 443 443, acct 163 89,
name_to_handle_at 303 264, open_by_handle_at 304 265,
prlimit64 302 261, setrlimit 160 164, setpriority 141 140, sched_setaffinity 203 122, sched_setscheduler 144 119,
sched_setparam 142 118, sched_setattr 314 274, ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239,
truncate 76 45, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55,
fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
setxattrat 463 463, removexattrat 466 466, file_setattr 469 469, mknod 133 -, mknodat 259 33
"""
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def supported() -> bool:
    """Whether the filter of system calls knows this machine."""
    return platform.system() == "Linux" and platform.machine() in _AUDIT_ARCHITECTURE


def unshare(flags: int) -> None:
    """Leave the namespaces that the flags name for new ones.

    Raises:
        OSError: it is not allowed.
    """
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount a file system.

    Raises:
        OSError: it is not allowed, or there is no such source or target.
    """
    texts = [os.fsencode(text) or None for text in (source, target, kind, data)]
    _checked(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def make_read_only(target: str, *, recursive: bool) -> None:
    """Let nothing be written to a mount, and nothing gain privileges or devices through it.

    Raises:
        OSError: it is not allowed.
    """
    attributes = struct.pack("<QQQQ", READ_ONLY | NO_SUID | NO_DEVICES, 0, 0, 0)
    at_fdcwd, at_recursive = -100, 0x8000
    flags = at_recursive if recursive else 0
    _checked(
        _libc.syscall(_MOUNT_SETATTR, at_fdcwd, os.fsencode(target), flags, attributes, ctypes.c_size_t(32)),
        f"mount_setattr {target}",
    )


def change_root(root: str) -> None:
    """Make a mount the root, and let go of the old one.

    Raises:
        OSError: it is not allowed.
    """
    os.chdir(root)
    _checked(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")


def drop_capabilities() -> None:
    """Give up all capabilities, for good."""
    header = struct.pack("<Ii", 0x20080522, 0)
    _checked(_libc.syscall(_CAPSET[platform.machine()], header, bytes(24)), "capset")
    _prctl(_NO_NEW_PRIVILEGES, 1)


def die_with_parent(signal: int) -> None:
    """Get a signal when the thread that forked this process ends."""
    _prctl(_PARENT_DEATH_SIGNAL, signal)


def forbid_tracing() -> None:
    """Let no process of the same user look into this one."""
    _prctl(_DUMPABLE, 0)


def landlock_version() -> int:
    """Of the kernel's Landlock; 0 is none."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)))


def landlock(readable: Sequence[str], listable: Sequence[str]) -> None:
    """Let files be read below some paths, directories be listed below others; nothing else of any file system.

    Raises:
        OSError: the kernel has no Landlock, or a path is missing.
    """
    version = landlock_version()
    files = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (1 << 15 if version >= 5 else 0)
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("<QQQ", files, network, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _checked(_libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    read_file, list_directory = 1 << 2, 1 << 3
    for paths, rights in ((readable, read_file), (listable, list_directory)):
        for path in paths:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("<Qi", rights, fd)
            _checked(_libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(fd)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)


def filter_system_calls() -> None:
    """Refuse the dangerous system calls, with EPERM, for good; needs `drop_capabilities` before.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    column = ("x86_64", "aarch64").index(platform.machine())
    entries = [entry.split() for entry in _REFUSED.split(",")]
    numbers = sorted(int(entry[1 + column]) for entry in entries if entry[1 + column] != "-")
    load, jump_equal, jump_at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | 1
    n = len(numbers)
    program = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, _AUDIT_ARCHITECTURE[platform.machine()]),
        (give, 0, 0, kill),  # a 32-bit call, whose numbers are others
        (load, 0, 0, 0),
        (jump_at_least, n + 1, 0, 0x40000000),  # the x32 numbers
        *((jump_equal, n - i, 0, number) for i, number in enumerate(numbers)),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    holder = Program(len(program), ctypes.addressof(code))
    _prctl(_SECCOMP, _FILTER, ctypes.addressof(holder))


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _checked(_libc.prctl(option, *padded), f"prctl {option}")


def _checked(result: int, what: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result

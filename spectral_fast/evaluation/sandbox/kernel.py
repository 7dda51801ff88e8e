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

# The system calls that a program may make: name, number on x86-64, number on 64-bit Arm (None where it has none).
# Memory; files; waiting; time; its own signals; itself. All others are refused, those of kernels to come, too.
_ALLOWED = """
brk 12 214, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, msync 26 227, mincore 27 232,
read 0 63, write 1 64, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, lseek 8 62, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24,
pipe 22 -, pipe2 293 59, creat 85 -, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, statfs 137 43,
fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61,
getcwd 79 17, chdir 80 49, fchdir 81 50, umask 95 166, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -,
mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36,
ftruncate 77 46, fallocate 285 47, fsync 74 82, fdatasync 75 83, fadvise64 221 223, sendfile 40 71,
copy_file_range 326 285,
select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd2 290 19, sendto 44 206, recvfrom 45 207,
time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101,
times 100 153, alarm 37 -, getitimer 36 102, setitimer 38 103,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, pause 34 -,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getresuid 118 148, getresgid 120 150, getgroups 115 158, getrlimit 97 163, getrusage 98 165, sysinfo 99 179,
uname 63 160, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, getrandom 318 278, futex 202 98,
exit 60 93, exit_group 231 94
"""
# Allowed with some arguments: per call the conditions that all must hold, (position, mask, values under the mask).
_ALL, _TRUNCATE, _WRITE, _READ_WRITE = 0xFFFFFFFF, 0o1000, 1, 2
_NOT_BY_READING = (_TRUNCATE | 3, (0, _WRITE, _READ_WRITE, _TRUNCATE | _WRITE, _TRUNCATE | _READ_WRITE))
_CONDITIONS = {
    # A file that is opened for reading is not truncated thereby: the first versions of Landlock would not mind.
    "open 2 -": ((1, *_NOT_BY_READING),),
    "openat 257 56": ((2, *_NOT_BY_READING),),
    # Descriptors, their flags, and locks; no owner of a file, who would get signals by it, and no leases.
    "fcntl 72 25": ((1, _ALL, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),),
    # isatty, the size of a terminal, bytes to read, non-blocking, inheritable and not.
    "ioctl 16 29": ((1, _ALL, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
    # A pair of Unix streams (asyncio wants one), which lead nowhere else; datagrams could be sent to other sockets.
    "socketpair 53 199": ((0, _ALL, (1,)), (1, _ALL ^ 0o2004000, (1,))),
}
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
    """Refuse all system calls but the allowed ones, with EPERM, for good; needs `drop_capabilities` before.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    load, jump_equal, give, conjunction = 0x20, 0x15, 0x06, 0x54
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | 1
    program = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, _AUDIT_ARCHITECTURE[platform.machine()]),
        (give, 0, 0, kill),  # a 32-bit call, whose numbers are others
        (load, 0, 0, 0),
    ]
    for entry, conditions in _CONDITIONS.items():
        test = []
        for position, mask, values in conditions:
            test += [(load, 0, 0, 16 + 8 * position), (conjunction, 0, 0, mask)]
            test += [(jump_equal, len(values) - i, 0, value) for i, value in enumerate(values)]
            test += [(give, 0, 0, refuse)]
        for number in _numbers(entry):
            program += [(jump_equal, 0, len(test) + 1, number), *test, (give, 0, 0, allow)]
    allowed = _numbers(_ALLOWED)
    program += [(jump_equal, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    holder = Program(len(program), ctypes.addressof(code))
    _prctl(_SECCOMP, _FILTER, ctypes.addressof(holder))


def _numbers(calls: str) -> list[int]:
    column = 1 + ("x86_64", "aarch64").index(platform.machine())
    return [int(call.split()[column]) for call in calls.split(",") if call.split()[column] != "-"]


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _checked(_libc.prctl(option, *padded), f"prctl {option}")


def _checked(result: int, what: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result

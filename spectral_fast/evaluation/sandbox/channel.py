"""Messages on pipes: four bytes of length, then the bytes."""

from __future__ import annotations

import os

LONGEST = 16 << 20


def send(fd: int, message: bytes) -> None:
    """Write one message, whole.

    Raises:
        ValueError: it is longer than 16 MiB.
        BrokenPipeError: nobody reads any more.
    """
    if len(message) > LONGEST:
        raise ValueError(f"a message of {len(message)} bytes is longer than the {LONGEST} that are allowed")
    data = memoryview(len(message).to_bytes(4, "big") + message)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> bytes:
    """Read one message, and not a byte more.

    Raises:
        EOFError: the other side is gone.
        ValueError: it announces more than 16 MiB.
    """
    length = int.from_bytes(_exactly(fd, 4), "big")
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes is announced; at most {LONGEST} are allowed")
    return _exactly(fd, length)


def _exactly(fd: int, n: int) -> bytes:
    parts = []
    while n:
        part = os.read(fd, min(n, 1 << 20))
        if not part:
            raise EOFError("the other side of the pipe is closed")
        parts.append(part)
        n -= len(part)
    return b"".join(parts)

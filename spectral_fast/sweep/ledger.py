"""The ledger of a sweep: one line of JSON per group of runs that is finished, on the disk before the next begins."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEDGER = "ledger.jsonl"


class Ledger:
    """What is finished. A line that a killed sweep left unfinished never happened; see `open_ledger`."""

    def __init__(self, descriptor: int, entries: list[dict[str, Any]]) -> None:
        self._descriptor, self.entries = descriptor, entries

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Run id -> its record, of those that are finished."""
        return {run["id"]: run for entry in self.entries for run in entry["runs"]}

    @property
    def failures(self) -> dict[str, str]:
        """Run id -> why it failed the last time, of those that never ended well."""
        failed = {run["id"]: run["error"] for entry in self.entries for run in entry["failures"]}
        return {name: error for name, error in failed.items() if name not in self.runs}

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry, and return when it would outlive a power cut."""
        rest = line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)
        self.entries.append(json.loads(line))  # as a later sweep will read it: lists, not tuples


@contextmanager
def open_ledger(directory: Path) -> Iterator[Ledger]:
    """The ledger in a folder, made if it is missing; nobody else can open it meanwhile.

    Raises:
        RuntimeError: another sweep has it.
        ValueError: a line, other than an unfinished last one, is damaged.
    """
    path = directory / LEDGER
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another sweep is writing to {directory}; wait for it to end") from error
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        entries = [_entry(path, number, line) for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1)]
        os.ftruncate(descriptor, whole)
        os.fsync(descriptor)
        folder = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new file itself is not lost
        finally:
            os.close(folder)
        yield Ledger(descriptor, entries)
    finally:
        os.close(descriptor)  # which unlocks it


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and all(isinstance(run["id"], str) for run in entry["runs"] + entry["failures"]):
            return entry
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} line {number} is damaged: delete the line, and its runs are done again")

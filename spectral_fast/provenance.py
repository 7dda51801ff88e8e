"""What a result was made with: versions of the software and hashes of the files."""

from __future__ import annotations

import hashlib
import platform
from concurrent.futures import CancelledError
from functools import cache
from importlib import metadata
from pathlib import Path
from threading import Event

from spectral_fast._version import __version__

PACKAGES = ("torch", "transformers", "peft", "safetensors", "datasets", "trl", "numpy", "vllm", "triton")


def versions() -> dict[str, str]:
    """Installed version per package, spectral_fast and Python included; packages that are absent are left out."""
    return dict(_versions())


@cache  # a sweep asks for every run, and each package's description is parsed
def _versions() -> dict[str, str]:
    found = {"spectral_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def sha256_file(path: Path, stop: Event | None = None) -> str:
    """SHA-256 of a file's bytes, streamed, as hex digits.

    Args:
        path: the file.
        stop: set by another thread, it ends the work with a `CancelledError`.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop is not None and stop.is_set():
                raise CancelledError(f"the hash of {path} is not wanted any more")
            digest.update(buffer[:count])
    return digest.hexdigest()

"""What a result was made with: versions of the software and hashes of the files."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

from spectral_fast._version import __version__

PACKAGES = ("torch", "transformers", "peft", "safetensors", "datasets", "numpy", "vllm", "triton")


def versions() -> dict[str, str]:
    """Installed version per package, spectral_fast and Python included; packages that are absent are left out."""
    found = {"spectral_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, streamed, as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

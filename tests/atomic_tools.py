"""Directories to replace, and processes that replace them."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from spectral_fast import atomic
from spectral_fast.atomic import replace_directory


def tree(directory: Path) -> dict[str, bytes]:
    """Relative path -> content of every file."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def fill(directory: Path, word: str) -> dict[str, bytes]:
    (directory / "sub").mkdir(parents=True)
    for name in ("config.json", "weights", "sub/note"):
        (directory / name).write_text(word * 1000)
    return tree(directory)


LOAD = f"""
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", {atomic.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
replace_directory = module.replace_directory
os.fsync = lambda entry: None  # a killed process loses nothing that the kernel has
"""


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", LOAD + textwrap.dedent(script), *arguments]


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith("."))


def refused(out: Path | str, kind: type[BaseException], message: str, **options: Any) -> None:
    with pytest.raises(kind, match=message), replace_directory(out, **options):
        pytest.fail("work began")

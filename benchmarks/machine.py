"""Where and with what a table was made. Imports torch only when asked for its version."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.timing import ROOT


def hardware() -> dict[str, str]:
    """Model of the processor and the number of cores that this process may use."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {"cpu": model[1] if model else os.uname().machine, "cpu_cores": str(len(os.sched_getaffinity(0)))}


def software() -> dict[str, str]:
    """The instruction set that the kernels of this process use, and torch's version."""
    import torch

    from spectral_fast import _C

    return {"isa": str(_C.isa()["chosen"]), "torch": torch.__version__}


def commit() -> str:
    """The commit of the source, with `-dirty` if there is anything that it lacks; "unknown" outside of git."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def command(module: str, argv: Sequence[str] | None) -> str:
    """What was run, to be run again anywhere: of an absolute path its name, the folders of this machine left out.

    Args:
        module: whose command it is.
        argv: its words; None for the process's own.
    """
    words = sys.argv[1:] if argv is None else argv
    told = (Path(word).name if Path(word).is_absolute() else word for word in words)
    return shlex.join(["python", "-m", module, *told])


def slug(facts: dict[str, str]) -> str:
    """A file name, e.g. `intel-xeon-processor-avx512-2-cores`."""
    text = f"{facts['cpu']} {facts['isa']} {facts['cpu_cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")

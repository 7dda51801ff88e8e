"""Where and with what a table was made. Imports torch only when asked for its version."""

from __future__ import annotations

import os
import re
import subprocess
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
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def slug(facts: dict[str, str]) -> str:
    """A file name, e.g. `intel-xeon-processor-avx512-2-cores`."""
    text = f"{facts['cpu']} {facts['isa']} {facts['cpu_cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")

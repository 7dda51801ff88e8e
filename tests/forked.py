"""Processes of their own for tests that need them, forked from one that has imported everything: it takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "matplotlib.figure"),
        *("spectral_fast.cli", "spectral_fast.calibration.probe"),
    ]
)
COMMAND = "import sys; from spectral_fast.cli import main; sys.exit(main(sys.argv[1:]))"


def run(script: str, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What `python -c script argv` gives, its status and what it wrote."""
    [done] = together(script, argv, [env or {}])
    return done


def ranks(size: int, script: str, *argv: str) -> list[subprocess.CompletedProcess[str]]:
    """The same in as many processes as torchrun would start, with the variables that it would give them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return together(script, argv, [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)])


def together(
    script: str, argv: Sequence[str], environments: Sequence[Mapping[str, str]], seconds: float = 250
) -> list[subprocess.CompletedProcess[str]]:
    """The script in one process per environment, all at the same time."""
    with TemporaryDirectory() as folder:
        files = [tuple(Path(folder, f"{name}{i}") for name in ("out", "err")) for i in range(len(environments))]
        processes = [
            _CONTEXT.Process(target=_child, args=(script, list(argv), dict(env), *map(str, pair)))
            for env, pair in zip(environments, files, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, [file.read_text() for pair in files for file in pair]
        return [
            subprocess.CompletedProcess([script, *argv], process.exitcode or 0, *(file.read_text() for file in pair))
            for process, pair in zip(processes, files, strict=True)
        ]


def _child(script: str, argv: list[str], env: dict[str, str], out: str, err: str) -> None:
    import torch

    torch.set_num_threads(1)  # as torchrun has it; OMP_NUM_THREADS is read no more
    # A fork's torch makes its thread pool anew when it is first asked for it, and two threads that ask at once, such as
    # transformers' loaders, may get none ("Invalid thread pool!"). So a fork asks while it has one thread.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    sys.argv = ["-c", *argv]
    os.environ.update(env)
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})

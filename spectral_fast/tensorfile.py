"""Safetensors files one tensor at a time: read by name, rewrite with some replaced and the rest carried.

The format: an 8-byte little-endian header length, a JSON header, and the tensors back to back. The library's
`safe_open` reads it, but does not say where a tensor lies, which replacing tensors in a stream must know;
with that known a read is one `preadv`. The library also maps the file, so that reading 109 MB grew the
resident set by 115 MB instead of 20 MB, and its errors name neither file nor tensor.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import CDLL, c_int64
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Put = Callable[[str, Tensor], None]
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
# Of one write. The page cache takes pages as large as a write: writing 1.7 GB by 2 MB pages took 0.6 to 1.9 s of a
# virtual machine's processor, by smaller ones 0.4 s.
_PIECE = 1 << 19
_WORTH_WRITING = 1 << 16  # bytes at once
_LIBC = CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2  # <linux/fs.h>: begin, do not wait
_LFS = b"version https://git-lfs.github.com/spec/"


class TensorInfo(NamedTuple):
    """What a file says of a tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, memory: Tensor | None = None) -> Tensor:
        """A tensor of this dtype and shape, at the beginning of `memory`, uint8 (bytes,), or in new memory."""
        if memory is None:
            return torch.empty(self.shape, dtype=self.dtype)
        return memory[: self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a safetensors file.

    Attributes:
        header: the bytes before the tensors, header length included; a rewrite keeps them as they are.
        tensors: name -> dtype and shape, in the header's order.
        offsets: name -> first byte in the file.
    """

    header: bytes
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(info.nbytes for info in self.tensors.values())

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> Layout:
        """Layout of a new file: wide dtypes first, so that every tensor is aligned to its own item size."""
        entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        for name, info in ordered:
            span = [position, position := position + info.nbytes]
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": span}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {name: len(header) + entries[name]["data_offsets"][0] for name, _ in ordered}
        return cls(header, dict(ordered), offsets)


class SafetensorsFile:
    """A safetensors file, checked when it is opened; tensors are read when asked for.

    Args:
        path: the file.

    Raises:
        ValueError: the file is not whole or not consistent; says which tensor is wrong, and how.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout = _read_layout(path)
        self.tensors: Mapping[str, TensorInfo] = self.layout.tensors

    def read(self, name: str, memory: Tensor | None = None) -> Tensor:
        """The tensor of that name, in its stored dtype and shape, in memory of its own.

        Args:
            name: its key.
            memory: bytes to put it into, uint8 (at least as many as it has,); new memory if left out.
        """
        tensor = self.tensors[name].empty(memory)
        with self.path.open("rb", buffering=0) as file:
            _read_into(file, memoryview(_as_bytes(tensor)), self.layout.offsets[name])
        return tensor

    @contextmanager
    def rewriting(self, path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[Put]:
        """Write this file anew at `path`: the tensors that are put, every other byte as it is.

        Args:
            path: the new file.
            shapes: name -> shape of tensors that get another one; those must be put.
        """
        layout = self.layout
        if shapes:
            metadata = json.loads(layout.header[8:]).get("__metadata__")
            layout = Layout.of(reshaped(self.tensors, shapes), metadata)
        with writing_safetensors(path, layout, carry_from=self) as put:
            yield put


def reshaped(tensors: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """The tensors of a file, some of them of another shape."""
    return dict(tensors) | {name: TensorInfo(tensors[name].dtype, shape) for name, shape in shapes.items()}


@contextmanager
def writing_safetensors(path: Path, layout: Layout, carry_from: SafetensorsFile | None = None) -> Iterator[Put]:
    """Write a safetensors file in one pass, each tensor at its place as soon as it comes, in any order.

    Args:
        path: the new file.
        layout: its header and the place of each tensor.
        carry_from: the file whose bytes fill the places of tensors that were not put.

    Yields:
        put(name, values), for any thread: dtype and shape must be the layout's, on any device.

    Raises:
        ValueError: a tensor is unknown, comes twice, differs from the layout, or never comes.
        OSError: the file cannot be written; names it.
    """
    missing = dict(layout.tensors)
    with path.open("xb", buffering=0) as file:
        _reserve(file, layout.size)
        _write(file, layout.header, 0)

        def put(name: str, tensor: Tensor) -> None:
            check_replacement(path, name, tensor, layout.tensors, missing)
            del missing[name]
            _write(file, _as_bytes(tensor.detach().cpu()), layout.offsets[name])
            _start_writeback(file, layout.offsets[name], layout.tensors[name].nbytes)

        yield put
        if carry_from is not None:
            _carry(file, layout, carry_from, missing)
        elif missing:
            raise ValueError(f"{path}: {len(missing)} tensors were never given, the first is {next(iter(missing))}")


def _carry(file: FileIO, layout: Layout, origin: SafetensorsFile, names: Iterable[str]) -> None:
    # Through a small buffer that stays in cache: as fast as copy_file_range where that cannot share blocks.
    buffer = memoryview(bytearray(1 << 20))
    with origin.path.open("rb", buffering=0) as source:
        for name in names:
            info = layout.tensors[name]
            if origin.tensors.get(name) != info:
                raise ValueError(f"{origin.path} cannot supply {name} for {file.name}: it has no such {info}")
            for done in range(0, info.nbytes, len(buffer)):
                chunk = buffer[: info.nbytes - done]
                _read_into(source, chunk, origin.layout.offsets[name] + done)
                _write(file, chunk, layout.offsets[name] + done)


def _read_layout(path: Path) -> Layout:
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is truncated or not safetensors: its header should have {length} of its {size} bytes"
            )
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
        entries.pop("__metadata__", None)
        items = list(entries.items())
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header is not a JSON object ({error})") from error

    base = 8 + length
    spans: dict[str, tuple[int, int]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, entry in items:
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, start, stop)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: {name} needs dtype, shape and data_offsets, got {entry!r}") from error
        if str(dtype) not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{path}: {name} needs whole numbers from 0, got shape {shape}, offsets {(start, stop)}")
        info = TensorInfo(DTYPES[dtype], shape)
        if stop - start != info.nbytes:
            raise ValueError(f"{path}: {name} is {dtype} {shape}, {info.nbytes} bytes, but has {stop - start}")
        if base + stop > size:
            raise ValueError(f"{path} is truncated: {name} ends at byte {base + stop}, the file at {size}")
        tensors[name], spans[name] = info, (start, stop)

    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            raise ValueError(f"{path}: {name} begins at offset {start}, but the tensor before it ends at {end}")
        end = stop
    if base + end != size:
        raise ValueError(f"{path}: its tensors end at byte {base + end}, the file at {size}")
    return Layout(prefix + text, tensors, {name: base + start for name, (start, _) in spans.items()})


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key comes twice")
    return unique


def refuse_lfs_pointer(path: Path) -> None:
    """Say so if `path` is what a clone without git-lfs leaves in place of the weights."""
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in {path.parent}")


def check_replacement(
    path: Path,
    name: str,
    tensor: Tensor,
    expected: Mapping[str, TensorInfo],
    missing: Mapping[str, TensorInfo],
) -> None:
    """Refuse a tensor that the file does not expect (any more), or not in this dtype and shape."""
    if name not in missing:
        raise ValueError(f"{path}: {name} {'was given twice' if name in expected else 'is not a tensor of this file'}")
    got = TensorInfo(tensor.dtype, tuple(tensor.shape))
    if got != expected[name]:
        raise ValueError(
            f"{path}: {name} is to be {expected[name].dtype} {expected[name].shape}, got {got.dtype} {got.shape}"
        )


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _reserve(file: FileIO, size: int) -> None:
    """Allot the blocks first: a full disk shows at once, and ext4 then takes writes 2 to 3 times as fast."""
    if hasattr(os, "posix_fallocate"):
        try:
            with _naming(file):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _read_into(file: FileIO, buffer: memoryview, offset: int) -> None:
    while buffer:
        with _naming(file):
            count = os.preadv(file.fileno(), [buffer], offset)
        if count == 0:
            raise ValueError(f"{file.name} ends at byte {offset}: it was changed while it was read")
        buffer, offset = buffer[count:], offset + count


def _start_writeback(file: FileIO, offset: int, size: int) -> None:
    """Set the disk to work: it then writes while the next tensors are computed, not all in the final fsync.

    Linux only, and a hint: nothing is said of failure, as the fsync tells of it. Of thousands of tiny tensors the calls
    would cost more than the wait.
    """
    if size >= _WORTH_WRITING and hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(file.fileno(), c_int64(offset), c_int64(size), _SYNC_FILE_RANGE_WRITE)


def _write(file: FileIO, content: Any, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        with _naming(file):
            count = os.pwrite(file.fileno(), rest[:_PIECE], offset)
        rest, offset = rest[count:], offset + count


@contextmanager
def _naming(file: FileIO) -> Iterator[None]:
    """Calls on file descriptors fail without a file's name: add it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error

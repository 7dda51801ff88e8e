"""Weight files in the older format: a pickled dict of tensors, as torch.save writes it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_fast.tensorfile import Put, TensorInfo, check_replacement, refuse_lfs_pointer, reshaped


class PickleFile:
    """A state dict saved by torch.save; a pickle that needs more than tensors is refused.

    The format has no fixed places to write to: replaced tensors are held in memory until all have come.

    Args:
        path: the file.

    Raises:
        ValueError: not a state dict, or its pickle would run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = self._load()
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(value.dtype, tuple(value.shape))
            for name, value in self._state.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }

    def _load(self) -> dict[str, Any]:
        refuse_lfs_pointer(self.path)
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{self.path} needs more than weights_only allows, or is damaged; a pickle is code, so no "
                f"more is loaded from it. If you trust its source, save it as safetensors yourself. {error}"
            ) from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{self.path} is not a file written by torch.save, or is truncated: {error}") from error
        if not isinstance(state, dict):
            raise ValueError(f"{self.path} should hold a dict of tensors, got a {type(state).__name__}")
        return state

    def read(self, name: str, memory: Tensor | None = None) -> Tensor:
        """The tensor of that name, in its stored dtype and shape, in `memory` or memory of its own."""
        return self.tensors[name].empty(memory).copy_(self._state[name].detach())

    @contextmanager
    def rewriting(self, path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[Put]:
        """Save this state dict anew at `path`, in the same format and key order, with what is put in place.

        Args:
            path: the new file.
            shapes: name -> shape of tensors that get another one; those must be put.
        """
        state = self._load()
        expected = reshaped(self.tensors, shapes or {})
        missing = dict(expected)

        def put(name: str, tensor: Tensor) -> None:
            check_replacement(path, name, tensor, expected, missing)
            del missing[name]
            state[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

        yield put
        if unmet := [name for name in shapes or {} if name in missing]:
            raise ValueError(f"{path}: {unmet[0]} was to get another shape, and was never given")
        torch.save(state, path, _use_new_zipfile_serialization=zipfile.is_zipfile(self.path))

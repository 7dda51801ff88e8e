"""Files of a base model: found, and known to be whole before anything is made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from spectral_fast.tensorfile import SafetensorsFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checkpoint_files(base_model: str, cache_dir: str | None = None) -> list[Path]:
    """The safetensors files of a local folder or of a repository on the hub; none if it has no such.

    Raises:
        FileNotFoundError: the index names a file that is not there.
        ValueError: the index is damaged.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    def find(name: str) -> Path | None:
        found = cached_file(
            base_model,
            name,
            cache_dir=cache_dir,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(cast("str", found))

    if single := find(SINGLE):
        return [single]
    index = find(INDEX)
    if index is None:
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards ({type(error).__name__}: {error})") from error
    if Path(base_model).is_dir():
        files = [index.parent / str(name) for name in sorted(names)]
        if absent := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{index} names {absent[0]}, which is not there: the download is incomplete")
        return files
    return [Path(file) for file in get_checkpoint_shard_files(base_model, str(index), cache_dir=cache_dir)[0]]


def check_checkpoint(base_model: str, files: Sequence[Path], config: Any) -> None:
    """Refuse files that are damaged, and weights that are no floating-point numbers for no reason that is given.

    Raises:
        ValueError: naming file and tensor.
    """
    for file in files:
        tensors = SafetensorsFile(file).tensors
        if getattr(config, "quantization_config", None) is None:
            for name, info in tensors.items():
                if name.endswith(".weight") and info.dtype not in FLOATS:
                    raise ValueError(
                        f"{file}: {name} is {str(info.dtype).removeprefix('torch.')}, and the config.json of "
                        f"{base_model} has no quantization_config that says what its numbers mean"
                    )


def check_nothing_missing(base_model: str, architecture: str, missing: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks tensors of the model, which would be made up.

    Raises:
        ValueError: naming one of them.
    """
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(
            f"{base_model} has no weights for {min(missing)}{more} of {architecture}: an incomplete checkpoint, or the "
            "config.json of another model"
        )

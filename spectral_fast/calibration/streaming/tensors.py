"""Tensors of a model on disk, by their names in the model: transformers' conversion rules say what makes which."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_fast.tensorfile import SafetensorsFile

_PAGE = 4096


@dataclass(frozen=True)
class Recipe:
    """How tensors of the checkpoint become tensors of the model: under another name, or by a conversion."""

    target: str
    converter: Any | None
    sources: list[tuple[str | None, str]]  # pattern of the converter, key in the checkpoint


class Tensors:
    """A model's tensors in its checkpoint; nothing is read before it is asked for.

    Args:
        model: as made on the meta device from its config, not yet wrapped by an adapter.
        files: the checkpoint, see `checkpoint_files`.

    Attributes:
        files: the checkpoint.

    Raises:
        RuntimeError: transformers is older than 5.
    """

    def __init__(self, model: Any, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._model = model
        self._metas: dict[str, Tensor] = {name: meta.to("meta") for name, meta in model.state_dict().items()}
        self._tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
        shards = [SafetensorsFile(path) for path in files]
        self._shards = {key: shard for shard in shards for key in shard.tensors}
        self._made: dict[str, tuple[Recipe, Tensor]] = {}
        for recipe in _recipes(model, self._metas, self._shards):
            for name, meta in self._convert(recipe, self._meta_source).items():
                self._made[name] = recipe, meta

    def source(self, name: str) -> str | None:
        """Under which name the checkpoint has what the model calls so: another one if it is tied, None if it lacks it.

        Raises:
            ValueError: it has another shape than in the model.
        """
        found = self.find(name)
        if found is not None and self.meta(found).shape != self._metas[name].shape:
            raise ValueError(
                f"{name} is {tuple(self._metas[name].shape)} in the model that config.json describes, but "
                f"{tuple(self.meta(found).shape)} in {self.files[0].parent}"
            )
        return found

    def find(self, name: str) -> str | None:
        """As `source`, of whatever shape it is."""
        return next((alias for alias in _aliases(name, self._tied) if alias in self._made), None)

    def meta(self, source: str) -> Tensor:
        """A tensor's shape and dtype in the checkpoint, without its values."""
        return self._made[source][1]

    def stored(self, source: str) -> tuple[int, torch.dtype]:
        """Bytes that are read for a tensor, and its dtype in the checkpoint."""
        recipe, meta = self._made[source]
        return sum(self._shards[key].tensors[key].nbytes for _, key in recipe.sources), meta.dtype

    def read(self, source: str) -> Tensor:
        """The values under the name that `source` gave, in the checkpoint's dtype; a mapping of the file if it can."""
        recipe, _ = self._made[source]
        return self._convert(recipe, partial(self._source, {}, None))[source]

    def _source(self, mappings: dict[Path, Tensor], dtype: torch.dtype | None, key: str) -> Tensor:
        """A tensor of the checkpoint, as a view of its mapped file if it need not be changed.

        Files are mapped anew for every part, so that pages leave memory with the part's last tensor.
        """
        shard = self._shards[key]
        info, offset = shard.tensors[key], shard.layout.offsets[key]
        if shard.path not in mappings:
            size = shard.path.stat().st_size
            mappings[shard.path] = torch.from_file(str(shard.path), shared=False, size=size, dtype=torch.uint8)
        with shard.path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(file.fileno(), offset, info.nbytes, os.POSIX_FADV_WILLNEED)
        raw = mappings[shard.path][offset : offset + info.nbytes]
        raw[::_PAGE].sum()  # brings the pages in now, in this thread
        if offset % info.dtype.itemsize:
            raw = raw.clone()
        value = raw.view(info.dtype).view(info.shape)
        return value if dtype is None or not value.is_floating_point() else value.to(dtype)

    def _meta_source(self, key: str) -> Tensor:
        info = self._shards[key].tensors[key]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def _convert(self, recipe: Recipe, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if recipe.converter is None:
            return {recipe.target: read(recipe.sources[0][1])}
        converter = deepcopy(recipe.converter)
        for pattern, key in recipe.sources:
            converter.add_tensor(recipe.target, key, pattern, partial(read, key))
        made = converter.convert(recipe.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _recipes(model: Any, names: Mapping[str, Tensor], keys: Iterable[str]) -> Iterable[Recipe]:
    """Which keys of the checkpoint make which tensors of the model, by the rules of transformers' `from_pretrained`.

    Keys that the model has no use for (old buffers, heads of other tasks) are left out, as there.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    recipes: dict[str, Recipe] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:  # the key is right as it is but for a prefix
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, names)
        if name in names:
            recipe = recipes.setdefault(name, Recipe(name, by_pattern.get(pattern), []))
            recipe.sources.append((pattern, key))
    return recipes.values()


def _aliases(name: str, tied: Mapping[str, str]) -> Iterator[str]:
    """The name itself, and those of the tensors that it is tied to."""
    yield name
    origin = tied.get(name, name)
    yield origin
    yield from (other for other, source in tied.items() if source == origin)

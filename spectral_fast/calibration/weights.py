"""Weights of a base model read from its safetensors shards one part at a time, and dropped again after use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_fast.pipeline import in_order
from spectral_fast.tensorfile import SafetensorsFile

INSTEAD = "run without --stream"
Part = str | int  # a decoder layer by its number, or one of:
EMBEDDINGS, HEAD, OTHER = "embeddings", "head", "other"
_PAGE = 4096


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer of a module; it is on the meta device while its values are not there.

    The module itself is kept, not its path: an adapter that wraps the module changes the path.
    """

    module: nn.Module
    name: str
    meta: Tensor

    def put(self, value: Tensor) -> None:
        """Give the slot values, or the meta tensor again."""
        if self.name in self.module._parameters:
            self.module._parameters[self.name] = nn.Parameter(value, requires_grad=False)
        else:
            self.module._buffers[self.name] = value


@dataclass(frozen=True)
class _Recipe:
    """How tensors of the checkpoint become tensors of the model: under another name, or by a conversion."""

    target: str
    converter: Any | None
    sources: list[tuple[str | None, str]]  # pattern of the converter, key in the checkpoint


class Weights:
    """A model's weights on disk, in parts: each decoder layer, the input embeddings, the head, and the small rest.

    Names and layouts are converted with transformers' own rules. Everything is checked when this is made: no weight
    is read before it is known that all are there, in the right shapes.

    Args:
        model: causal language model as `skeleton.empty_model` makes it, not yet wrapped by an adapter.
        files: the checkpoint, see `checkpoint_files`.
        layers: name of the decoder layers, e.g. "model.layers".
        device: where to compute; a CPU uses weights of the model's own dtype where they are mapped, without a copy.

    Attributes:
        files: the checkpoint.
        bytes_read: of the checkpoint, so far.

    Raises:
        RuntimeError: transformers is older than 5.
        ValueError: the checkpoint lacks tensors, or has some in another shape than the model.
    """

    def __init__(self, model: Any, files: Sequence[Path], layers: str, device: torch.device) -> None:
        self.files, self.device, self.bytes_read = list(files), device, 0
        self._model = model
        self._metas: dict[str, Tensor] = {name: meta.to("meta") for name, meta in model.state_dict().items()}
        self._wide: Mapping[str, torch.dtype] = model._get_dtype_plan(model.dtype)
        shards = [SafetensorsFile(path) for path in files]
        self._shards = {key: shard for shard in shards for key in shard.tensors}
        made: dict[str, tuple[_Recipe, Tensor]] = {}
        for recipe in _recipes(model, self._metas, self._shards):
            for name, meta in self._convert(recipe, self._meta_source).items():
                made[name] = recipe, meta
        ends = {model.get_input_embeddings(): EMBEDDINGS, model.get_output_embeddings(): HEAD}
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
        self._slots: dict[Part, list[tuple[Slot, str]]] = {}
        self._recipes: dict[Part, list[_Recipe]] = {}
        for name, meta in self._metas.items():
            path, _, attribute = name.rpartition(".")
            slot = Slot(model.get_submodule(path), attribute, meta)
            layer = re.match(rf"{re.escape(layers)}\.(\d+)\.", name)
            part: Part = int(layer[1]) if layer else ends.get(slot.module, OTHER)
            source = next((alias for alias in _aliases(name, tied) if alias in made), None)
            if source is None:
                raise ValueError(f"{files[0].parent} has no weights for {name} of {type(model).__name__}")
            recipe, found = made[source]
            if found.shape != meta.shape:
                raise ValueError(
                    f"{name} is {tuple(meta.shape)} in the model that config.json describes, but "
                    f"{tuple(found.shape)} in {files[0].parent}"
                )
            self._slots.setdefault(part, []).append((slot, source))
            recipes = self._recipes.setdefault(part, [])
            if not any(recipe is known for known in recipes):
                recipes.append(recipe)

    def nbytes(self, part: Part) -> int:
        """Size of a part in the checkpoint."""
        keys = [key for recipe in self._recipes.get(part, ()) for _, key in recipe.sources]
        return sum(self._shards[key].tensors[key].nbytes for key in keys)

    def drop(self, part: Part) -> None:
        """Empty the slots of a part; its memory is free when nothing else holds its tensors."""
        for slot, _ in self._slots.get(part, ()):
            slot.put(slot.meta)

    @contextmanager
    def placeholders(self) -> Iterator[None]:
        """Within the context every slot has a float32 tensor of its shape on the device, without memory of its own.

        For PEFT, which puts a layer's adapter where the layer's weights are, and rounds it to their dtype.
        """
        every = [slot for slots in self._slots.values() for slot, _ in slots]
        try:
            for slot in every:
                slot.put(torch.zeros((), device=self.device).expand(slot.meta.shape))
            yield
        finally:
            for slot in every:
                slot.put(slot.meta)

    @contextmanager
    def prefetched(self, parts: Iterable[Part]) -> Iterator[Iterator[Part]]:
        """Give an iterator over `parts` that has put a part's values in their slots when it gives the part.

        A thread reads the next part meanwhile; what goes wrong there is raised at that part's turn. No thread is
        left when the context ends. Parts are dropped by the caller.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        with in_order(lambda part, _: (part, self._read(part, stream)), parts, (None, None), 1) as read:

            def filled() -> Iterator[Part]:
                for part, values in read:
                    for slot, source in self._slots.get(part, ()):
                        slot.put(values[source])
                    values.clear()
                    yield part

            yield filled()

    def _read(self, part: Part, stream: torch.cuda.Stream | None) -> dict[str, Tensor]:
        """Tensors of a part by their names in the model, ready for use, on a GPU by that stream."""
        mappings: dict[Path, Tensor] = {}
        values: dict[str, Tensor] = {}
        for recipe in self._recipes.get(part, ()):
            dtype = self._dtype_of(recipe.target)
            values |= self._convert(recipe, partial(self._source, mappings, dtype))
        self.bytes_read += self.nbytes(part)
        return values if stream is None else _on_device(values, stream)

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

    def _dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype that transformers would load a tensor in."""
        for pattern, dtype in self._wide.items():
            if re.search(pattern.replace("*", ".*"), name):
                return dtype
        return self._metas[name].dtype

    def _meta_source(self, key: str) -> Tensor:
        info = self._shards[key].tensors[key]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def _convert(self, recipe: _Recipe, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if recipe.converter is None:
            return {recipe.target: read(recipe.sources[0][1])}
        converter = deepcopy(recipe.converter)
        for pattern, key in recipe.sources:
            converter.add_tensor(recipe.target, key, pattern, partial(read, key))
        made = converter.convert(recipe.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _on_device(values: Mapping[str, Tensor], computing: torch.cuda.Stream) -> dict[str, Tensor]:
    """Copies on the GPU, made through pinned memory on a stream of their own while another one computes."""
    copying = torch.cuda.Stream(computing.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(copying):
        copies = {name: x.pin_memory().to(computing.device, non_blocking=True) for name, x in values.items()}
    copying.synchronize()
    for copy in copies.values():
        copy.record_stream(computing)  # its memory is not used again before what computes with it is done
    return copies


def _recipes(model: Any, names: Mapping[str, Tensor], keys: Iterable[str]) -> Iterable[_Recipe]:
    """Which keys of the checkpoint make which tensors of the model, by the rules of transformers' `from_pretrained`.

    Keys that the model has no use for (old buffers, heads of other tasks) are left out, as there.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        raise RuntimeError(f"--stream needs transformers 5 or later ({error}): upgrade it, or {INSTEAD}") from error

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    recipes: dict[str, _Recipe] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:  # the key is right as it is but for a prefix
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, names)
        if name in names:
            recipe = recipes.setdefault(name, _Recipe(name, by_pattern.get(pattern), []))
            recipe.sources.append((pattern, key))
    return recipes.values()


def _aliases(name: str, tied: Mapping[str, str]) -> Iterator[str]:
    """The name itself, and those of the tensors that it is tied to."""
    yield name
    origin = tied.get(name, name)
    yield origin
    yield from (other for other, source in tied.items() if source == origin)

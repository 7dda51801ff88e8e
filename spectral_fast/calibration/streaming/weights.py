"""Weights of a base model read from its safetensors shards one part at a time, and dropped again after use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_fast.calibration.streaming.tensors import Recipe, Tensors
from spectral_fast.pipeline import in_order

INSTEAD = "run without --stream"
Part = str | int  # a decoder layer by its number, or one of:
EMBEDDINGS, HEAD, OTHER = "embeddings", "head", "other"


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


class Weights(Tensors):
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
        super().__init__(model, files)
        self._wide: Mapping[str, torch.dtype] = model._get_dtype_plan(model.dtype)
        self.device, self.bytes_read = device, 0
        ends = {model.get_input_embeddings(): EMBEDDINGS, model.get_output_embeddings(): HEAD}
        self._slots: dict[Part, list[tuple[Slot, str]]] = {}
        self._recipes: dict[Part, list[Recipe]] = {}
        for name, meta in self._metas.items():
            path, _, attribute = name.rpartition(".")
            slot = Slot(model.get_submodule(path), attribute, meta)
            layer = re.match(rf"{re.escape(layers)}\.(\d+)\.", name)
            part: Part = int(layer[1]) if layer else ends.get(slot.module, OTHER)
            source = self.source(name)
            if source is None:
                raise ValueError(f"{files[0].parent} has no weights for {name} of {type(model).__name__}")
            recipe = self._made[source][0]
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

    def _dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype that transformers would load a tensor in."""
        for pattern, dtype in self._wide.items():
            if re.search(pattern.replace("*", ".*"), name):
                return dtype
        return self._metas[name].dtype


def _on_device(values: Mapping[str, Tensor], computing: torch.cuda.Stream) -> dict[str, Tensor]:
    """Copies on the GPU, made through pinned memory on a stream of their own while another one computes."""
    copying = torch.cuda.Stream(computing.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(copying):
        copies = {name: x.pin_memory().to(computing.device, non_blocking=True) for name, x in values.items()}
    copying.synchronize()
    for copy in copies.values():
        copy.record_stream(computing)  # its memory is not used again before what computes with it is done
    return copies

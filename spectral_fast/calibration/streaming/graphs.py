"""Graphs of layers kept from the forward to the backward sweep, without the layers' weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Graph:
    """A layer's pass over one pack, ready to be differentiated when the layer's weights are there.

    Attributes:
        x: the layer's input, a leaf.
        y: its output.
        leaves: name -> singular values per sample, see `per_sample`.
        nbytes: memory that is free when this is dropped.
    """

    x: Tensor
    y: Tensor
    leaves: Mapping[str, Tensor]
    nbytes: int


@dataclass(frozen=True)
class _View:
    """A view of a tensor that a module of the layer has, by its place there."""

    module: str
    name: str
    offset: int  # elements after the tensor's first
    size: torch.Size
    stride: tuple[int, ...]

    def of(self, layer: nn.Module) -> Tensor:
        whole: Tensor = getattr(layer.get_submodule(self.module), self.name)
        return whole.as_strided(self.size, self.stride, int(whole.storage_offset()) + self.offset)


def record(layer: nn.Module, compute: Callable[[], tuple[Tensor, Tensor, Mapping[str, Tensor]]]) -> Graph:
    """The graph of a computation with a layer, which holds none of the layer's own tensors.

    In their place it holds where they are in the layer, and looks them up in the backward pass.

    Args:
        layer: it must be whole again when the graph is differentiated.
        compute: gives x, y and leaves.
    """
    places = sorted(
        (value.data_ptr(), value.data_ptr() + value.nbytes, path, name)
        for path, module in layer.named_modules()
        for name, value in [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]
        if isinstance(value, Tensor) and value.is_contiguous() and value.numel() > 0
    )
    starts = [place[0] for place in places]
    sizes: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor | _View:
        at = bisect_right(starts, value.data_ptr()) - 1
        if at >= 0 and value.data_ptr() < places[at][1] and value.numel() > 0:
            start, _, path, name = places[at]
            offset = (value.data_ptr() - start) // value.itemsize
            return _View(path, name, offset, value.size(), value.stride())
        storage = value.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return value

    def unpack(kept: Any) -> Tensor:
        return kept.of(layer) if isinstance(kept, _View) else kept

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        x, y, leaves = compute()
    for value in (x, y):
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return Graph(x, y, leaves, sum(sizes.values()))


class KeptGraphs:
    """The graphs of the highest layers, as many as fit.

    Layers come from the lowest to the highest, and are wanted again in the opposite order, so that the lowest leave
    when there is no room. What has left must be computed again.

    Args:
        budget: memory, in bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._sizes: dict[int, int] = {}

    def worth(self, layers_above: int) -> bool:
        """Whether a graph of a layer is likely to stay, if those above are as large as those seen so far."""
        return layers_above * max(self._sizes.values(), default=0) < self.budget

    def put(self, layer: int, pack: int, graph: Graph) -> None:
        """Keep a graph, if need be in place of graphs of lower layers."""
        self._sizes[layer] = self._sizes.get(layer, 0) + graph.nbytes
        room = self.budget - sum(kept.nbytes for kept in self._graphs.values())
        for key in [key for key in self._graphs if key[0] < layer]:
            if graph.nbytes <= room:
                break
            room += self._graphs.pop(key).nbytes
        if graph.nbytes <= room:
            self._graphs[layer, pack] = graph

    def take(self, layer: int, pack: int) -> Graph | None:
        """The graph of that layer and pack, if it was kept; it is then the caller's."""
        return self._graphs.pop((layer, pack), None)

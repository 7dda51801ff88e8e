"""The key-value cache of the decoding loop: it grows in place, loses ended rows, starts from a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

States = tuple[Tensor, Tensor]  # one layer's keys and values


class _Growing:
    """A tensor (batch, heads, length, head size) with room to append in place."""

    def __init__(self, held: Tensor) -> None:
        self.held = self._store = held

    def append(self, new: Tensor) -> Tensor:
        old, length = self.held.shape[-2], self.held.shape[-2] + new.shape[-2]
        if self._store.shape[-2] < length:
            self._store = new.new_empty(*new.shape[:2], length + max(length // 2, 64), new.shape[-1])
            self._store[..., :old, :] = self.held
        self._store[..., old:length, :] = new
        self.held = self._store[..., :length, :]
        return self.held


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a transformers cache that appends in place, where the library copies all for each token."""

    def __init__(self, states: States | None = None, **_: Any) -> None:
        super().__init__()
        if states is not None:
            self._hold(states)

    def _hold(self, states: States) -> None:
        self.dtype, self.device, self.is_initialized = states[0].dtype, states[0].device, True
        self._growing = _Growing(states[0]), _Growing(states[1])
        self.keys, self.values = states

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> States:
        """Append, and return all keys and values so far."""
        if not self.is_initialized:
            self._hold((key_states[..., :0, :], value_states[..., :0, :]))
        self.keys = self._growing[0].append(key_states)
        self.values = self._growing[1].append(value_states)
        return self.keys, self.values

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows of the batch but these."""
        self._hold((self.keys[rows], self.values[rows]))


def empty_cache() -> Any:
    """A cache for any number of layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def prefixed_cache(length: int, prefix: Sequence[States], padding: Tensor) -> Any:
    """A cache of the first columns of left-padded rows that all begin with the same tokens.

    Rows are aligned at their ends, so column c of a row with padding n holds the prefix's token c - n; the
    tokens of the prefix that a short row thereby lacks run again with the rest of its prompt.

    Args:
        length: number of the prefix's tokens.
        prefix: its keys and values per layer, (heads, length, head size).
        padding: (batch,) number of padding columns of each row.
    """
    column = (torch.arange(length, device=padding.device) - padding[:, None]).clamp_min(0)
    return Cache(layers=[GrowingLayer((k[:, column].transpose(0, 1), v[:, column].transpose(0, 1))) for k, v in prefix])

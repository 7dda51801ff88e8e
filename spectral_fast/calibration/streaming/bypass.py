"""A model's trunk run without its layers: how it calls each of them, and what it does before and after them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spectral_fast.calibration.packed.decoder import Decoder
from spectral_fast.calibration.packed.packing import Pack
from spectral_fast.calibration.streaming.weights import INSTEAD


@dataclass(frozen=True)
class Call:
    """How the trunk calls a layer: all but the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: bool  # whether the hidden states are given by name

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output for these hidden states."""
        if self.named:
            out = layer(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            out = layer(hidden, *self.args, **self.kwargs)
        y: Tensor = out[0] if isinstance(out, tuple) else out
        return y


@dataclass
class Trace:
    """What a trunk did around its layers for one pack.

    Attributes:
        first: what it gave the first layer.
        calls: how it called each of them.
        last: its last hidden states, for `first` as the output of the last layer.
    """

    first: Tensor
    calls: list[Call]
    last: Tensor


class _OtherFormError(Exception):
    """The trunk does not take the output of its layers as they gave it."""


@dataclass
class _Chain:
    """Hidden states on their way through stand-ins for the layers."""

    form: Callable[[Tensor], Any]
    given: Tensor | None
    refusal: str
    calls: list[Call] = field(default_factory=list)
    first: Tensor | None = None
    passed: Tensor | None = None

    def through(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = "hidden_states" in kwargs
        hidden = kwargs.pop("hidden_states") if named else args[0]
        if index != len(self.calls) or (self.passed is not None and hidden is not self.passed):
            raise _OtherFormError
        others = tuple(self._constant(value) for value in (args if named else args[1:]))
        self.calls.append(Call(others, {name: self._constant(value) for name, value in kwargs.items()}, named))
        if self.first is None:
            self.first = hidden
            hidden = hidden if self.given is None else self.given
        self.passed = hidden
        return self.form(hidden)

    def _constant(self, value: Any) -> Any:
        """A value by which no layer can hand on anything to another one."""
        if isinstance(value, MutableMapping) and not value:
            return _Unread(self.refusal)
        if not _immutable(value):
            raise ValueError(self.refusal)
        return value


def _immutable(value: Any) -> bool:
    if isinstance(value, list):  # of numbers, such as the starts of samples; an empty one may be there to be filled
        return bool(value) and all(isinstance(item, int | float) for item in value)
    if isinstance(value, tuple):
        return all(_immutable(item) for item in value)
    return value is None or isinstance(value, Tensor | int | float | str)


class _Unread(UserDict[Any, Any]):
    """In the place of an empty mapping that all layers are given: models may fill it in vain, but not look into it."""

    def __init__(self, refusal: str) -> None:
        super().__init__()
        self._refusal = refusal

    def __setitem__(self, *_: Any) -> None:
        pass

    def __getitem__(self, _: Any) -> Any:
        raise ValueError(self._refusal)

    def __contains__(self, _: Any) -> bool:
        raise ValueError(self._refusal)


class _StandIn(nn.Module):
    """In the place of a layer, with its attributes: hands hidden states through."""

    def __init__(self, chain: _Chain, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._chain, self._index, self._layer = chain, index, (layer,)  # in a tuple, it is no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._chain.through(self._index, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)


def bypass(decoder: Decoder, pack: Pack, given: Tensor | None = None) -> Trace:
    """Run the trunk on a pack without computing any layer.

    Args:
        decoder: the model; all its trunk but the layers must have its weights.
        pack: on the model's device.
        given: output of the last layer; the embeddings then need not have their weights.

    Raises:
        ValueError: the trunk does more between its layers than to hand on hidden states.
    """
    name = type(decoder.model).__name__
    refusal = f"{name}'s layers may hand on more than hidden states, such as keys and values that they share; {INSTEAD}"
    if getattr(decoder.model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise ValueError(refusal)
    # Most layers return hidden states, some of the older ones a tuple of which they are the first.
    for form in (lambda hidden: hidden, lambda hidden: (hidden,)):
        chain = _Chain(form, given, refusal)
        try:
            with _stand_ins(decoder, chain):
                last = decoder.hidden(pack)
        except _OtherFormError:
            continue
        assert chain.first is not None
        return Trace(chain.first, chain.calls, last)
    raise ValueError(f"{name} computes something between its layers, which cannot be streamed; {INSTEAD}")


@contextmanager
def _stand_ins(decoder: Decoder, chain: _Chain) -> Iterator[None]:
    layers = decoder.layers[1]
    real, embedding = list(layers), decoder.model.get_input_embeddings()
    own = vars(embedding).get("forward")  # hooks on a module may have put one there
    try:
        for index, layer in enumerate(real):
            layers[index] = _StandIn(chain, index, layer)
        if chain.given is not None:
            embedding.forward = lambda *_, **__: chain.given
        yield
    finally:
        for index, layer in enumerate(real):
            layers[index] = layer
        if chain.given is not None:
            del embedding.forward
            if own is not None:
                embedding.forward = own

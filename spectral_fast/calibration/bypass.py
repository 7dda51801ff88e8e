"""A model's trunk run without its layers: how it calls each of them, and what it does before and after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spectral_fast.calibration.decoder import Decoder
from spectral_fast.calibration.packing import Pack


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
    calls: list[Call] = field(default_factory=list)
    first: Tensor | None = None
    passed: Tensor | None = None

    def through(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = "hidden_states" in kwargs
        hidden = kwargs.pop("hidden_states") if named else args[0]
        if index != len(self.calls) or (self.passed is not None and hidden is not self.passed):
            raise _OtherFormError
        if odd := [name for name, value in kwargs.items() if isinstance(value, dict)]:
            raise ValueError(f"its layers hand on {odd[0]} to each other beside the hidden states")
        self.calls.append(Call(args if named else args[1:], kwargs, named))
        if self.first is None:
            self.first = hidden
            hidden = hidden if self.given is None else self.given
        self.passed = hidden
        return self.form(hidden)


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
    # Most layers return hidden states, some of the older ones a tuple of which they are the first.
    for form in (lambda hidden: hidden, lambda hidden: (hidden,)):
        chain = _Chain(form, given)
        try:
            with _stand_ins(decoder, chain):
                last = decoder.hidden(pack)
        except _OtherFormError:
            continue
        assert chain.first is not None
        return Trace(chain.first, chain.calls, last)
    raise ValueError(
        f"{type(decoder.trunk).__name__} computes something between its layers, which cannot be streamed; "
        "run without --stream"
    )


@contextmanager
def _stand_ins(decoder: Decoder, chain: _Chain) -> Iterator[None]:
    layers = decoder.layers[1]
    real, embedding = list(layers), decoder.model.get_input_embeddings()
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

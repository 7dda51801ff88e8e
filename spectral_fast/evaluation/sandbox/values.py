"""Plain values as JSON and back: all that passes between a program and its tests.

None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, Fraction and Decimal arrive as
they were, subclasses of them as their base, numpy scalars as Python's, iterators as iterators over their items.
JSON, since decoding it runs no code.
"""

from __future__ import annotations

import json
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from decimal import Decimal
from fractions import Fraction
from typing import Any

_EXACT = 2**53


class Opaque:
    """Stands for a value that could not be carried; equals nothing else."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def dumps(value: Any, *, strict: bool) -> bytes:
    """The value as JSON.

    Args:
        value: what to carry.
        strict: raise at what cannot be carried, else let it arrive as an `Opaque`.

    Raises:
        TypeError: such a value, if strict.
        RecursionError: the value is nested too deeply, or contains itself.
    """
    return json.dumps(_encode(value, strict), separators=(",", ":")).encode()


def loads(text: bytes) -> Any:
    """The value of a JSON text by `dumps`.

    Raises:
        ValueError, TypeError, LookupError, RecursionError: the text is not by `dumps`.
    """
    return _decode(json.loads(text))


def _encode(v: Any, strict: bool) -> Any:
    if v is None or isinstance(v, bool):
        return v
    if isinstance(v, int):
        number = int.__int__(v)
        return number if abs(number) < _EXACT else {"int": hex(number)}
    if isinstance(v, float):
        return {"float": float.hex(v)}
    if isinstance(v, str):
        return str.__str__(v)
    if isinstance(v, list):
        return [_encode(item, strict) for item in list.__iter__(v)]
    for cls in _COLLECTIONS:
        if isinstance(v, cls):
            return {cls.__name__: [_encode(item, strict) for item in cls.__iter__(v)]}
    if isinstance(v, dict):
        return {"dict": [[_encode(key, strict), _encode(item, strict)] for key, item in dict.items(v)]}
    if isinstance(v, (bytes, bytearray)):
        return {"bytes" if isinstance(v, bytes) else "bytearray": bytes(v).hex()}
    if isinstance(v, complex):
        return {"complex": [float.hex(v.real), float.hex(v.imag)]}
    if isinstance(v, range):
        return {"range": [_encode(part, strict) for part in (v.start, v.stop, v.step)]}
    if isinstance(v, (Fraction, Decimal)):
        return {"Fraction" if isinstance(v, Fraction) else "Decimal": str(v)}
    if isinstance(v, (Iterator, KeysView, ValuesView, ItemsView)):
        return {"iterator": [_encode(item, strict) for item in v]}
    if type(v).__module__ == "numpy" and getattr(v, "ndim", None) == 0:
        return _encode(v.item(), strict)
    if isinstance(v, Opaque):  # it comes from a program, and goes back to it
        return {"opaque": v.kind}
    if strict:
        raise TypeError(f"a {type(v).__name__} cannot be passed to a program in the sandbox, only plain values can")
    return {"opaque": type(v).__name__}


_COLLECTIONS: tuple[Any, ...] = (tuple, set, frozenset)

_DECODERS: Mapping[str, Any] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "tuple": lambda items: tuple(_decode(items)),
    "set": lambda items: set(_decode(items)),
    "frozenset": lambda items: frozenset(_decode(items)),
    "dict": lambda pairs: {_decode(key): _decode(item) for key, item in pairs},
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "range": lambda parts: range(*map(_decode, parts)),
    "Fraction": Fraction,
    "Decimal": Decimal,
    "iterator": lambda items: iter(_decode(items)),
    "opaque": lambda kind: Opaque(str(kind)[:80]),
}


def _decode(x: Any) -> Any:
    if isinstance(x, list):
        return [_decode(item) for item in x]
    if isinstance(x, dict):
        [(kind, content)] = x.items()
        return _DECODERS[kind](content)
    return x

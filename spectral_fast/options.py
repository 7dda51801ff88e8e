"""Dataclasses as the one source of settings and flags: default, type, range, choices and help in one place."""

from __future__ import annotations

import argparse
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    positive: bool = False,
    shown: str | None = None,
) -> Any:
    """A dataclass field that is also a flag, with what `check` accepts. List defaults are given as tuples.

    `shown` says in words what the default stands for, where its value does not.
    """
    bounds = {"low": low, "high": high, "positive": positive}
    return field(default=default, metadata={"help": help, "choices": choices, "shown": shown, **bounds})


def check(instance: Any, where: str = "") -> None:
    """Check the values of a frozen dataclass made of `option` fields; to be called from `__post_init__`.

    Args:
        instance: the dataclass; an int given for a float becomes a float.
        where: what the values belong to, e.g. a mode; opens the message.

    Raises:
        TypeError: a value of another type than its default's or, where that is None, than the annotation's.
        ValueError: a value that is not finite, out of its range, or not among its choices.
    """
    hints = typing.get_type_hints(type(instance))
    for spec in fields(instance):
        value, kind, meta = getattr(instance, spec.name), type(spec.default), spec.metadata
        name = f"{where}: {spec.name}" if where else spec.name
        if spec.default is None:
            if value is None:
                continue
            kind = typing.get_args(hints[spec.name])[0]
        if kind is float and type(value) is int:
            object.__setattr__(instance, spec.name, float(value))
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} must be {kind.__name__}; got {value!r} ({type(value).__name__})")
        if meta["choices"] is not None and value not in meta["choices"]:
            raise ValueError(f"{name} must be one of {', '.join(meta['choices'])}; got {value!r}")
        if kind in (int, float) and (complaint := _out_of_range(value, spec)):
            raise ValueError(f"{name} {complaint}")


def _out_of_range(value: float, f: Field[Any]) -> str | None:
    if not math.isfinite(value):
        return f"must be finite; got {value}"
    low, high = f.metadata["low"], f.metadata["high"]
    if not low <= value <= high or (f.metadata["positive"] and value <= 0):
        return f"must be {bounds(f)}; got {value}"
    return None


def add_flags(parser: argparse._ActionsContainer, *classes: type, prefix: str = "") -> None:
    """Add a flag per field of the dataclasses; a field that several share becomes one flag.

    The flag is the field's name, after `prefix` unless it begins with it anyway.

    A flag that is not given is absent from the namespace, so that what the user said can be told from a default.
    A boolean field that is true by default becomes `--no_NAME`.
    """
    owners: dict[str, tuple[Field[Any], Any]] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            owners.setdefault(f.name, (f, hints[f.name]))
    for field_name, (f, hint) in owners.items():
        name = _prefixed(field_name, prefix)
        text = f.metadata.get("help", "").replace("%", "%%")
        if hint is bool:
            action, text = ("store_false", f"do not {text}") if f.default else ("store_true", text)
            switch = parser.add_argument(
                flag_name(f, prefix), dest=name, action=action, default=argparse.SUPPRESS, help=text
            )
            switch.fallback = f.default  # type: ignore[attr-defined]
            continue
        many = typing.get_origin(hint) in (tuple, list)
        scalar = typing.get_args(hint)[0] if many or _is_optional(hint) else hint
        noted = [bounds(f), f"default: {default}" if (default := shown_default(f)) else ""]
        text += f" ({'; '.join(filter(None, noted))})" if any(noted) else ""
        flag = parser.add_argument(
            flag_name(f, prefix),
            type=_reader(scalar, f),
            nargs="+" if many else None,
            choices=f.metadata.get("choices"),
            default=argparse.SUPPRESS,
            required=f.default is MISSING,
            help=text,
        )
        flag.fallback = f.default  # type: ignore[attr-defined]  # what is taken where the flag is absent


def _reader(kind: type, f: Field[Any]) -> Callable[[str], Any]:
    """What makes the value of a flag of its text, and refuses one that `check` would refuse."""

    def read(text: str) -> Any:
        value = kind(text)
        if kind in (int, float) and "low" in f.metadata and (complaint := _out_of_range(value, f)):
            raise argparse.ArgumentTypeError(complaint)
        return value

    read.__name__ = kind.__name__  # which argparse names
    return read


def flag_name(f: Field[Any], prefix: str = "") -> str:
    """The flag of a field, as the user types it."""
    return f"--no_{f.name}" if f.default is True else f"--{_prefixed(f.name, prefix)}"


def shown_default(f: Field[Any]) -> str:
    """The default of a field in words; nothing if there is none to speak of."""
    if (words := f.metadata.get("shown")) is not None:
        return str(words)
    if f.default is MISSING or f.default is None:
        return ""
    return " ".join(map(_as_typed, f.default)) if isinstance(f.default, (tuple, list)) else str(f.default)


def bounds(f: Field[Any]) -> str:
    """The range of a field's numbers in words; nothing if all will do."""
    low, high = (f.metadata.get(name, math.inf) for name in ("low", "high"))
    if f.metadata.get("positive"):
        return "above 0" if math.isinf(high) else f"above 0, at most {high:.10g}"
    if math.isinf(low):
        return "" if math.isinf(high) else f"at most {high:.10g}"
    return f"at least {low:.10g}" if math.isinf(high) else f"{low:.10g} to {high:.10g}"


def take(cls: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """An instance of the dataclass from the flags that were given; defaults for the rest."""
    flags = {f.name: _prefixed(f.name, prefix) for f in fields(cls)}  # type: ignore[arg-type]
    values = {name: given[flag] for name, flag in flags.items() if flag in given}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that may be meant; nothing if none is near."""
    words = {word.lstrip("-"): word for word in known}
    bare = name.lstrip("-")
    begun = [word for word in words if bare and word.startswith(bare)]
    close = begun if len(begun) == 1 else get_close_matches(bare, list(words), n=1)
    return f"; is {words[close[0]]} meant?" if close else ""


def _as_typed(value: Any) -> str:
    """A value in a list of defaults, in quotes if it has spaces or line breaks."""
    text = str(value)
    return text if text.split() == [text] else repr(text)


def _prefixed(name: str, prefix: str) -> str:
    return name if name.startswith(prefix) else prefix + name


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)

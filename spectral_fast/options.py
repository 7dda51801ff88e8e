"""Dataclasses as the one source of command-line flags: their fields are the flags, with default, type and help."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a flag. List defaults are given as tuples."""
    return field(default=default, metadata={"help": help, "choices": choices})


def add_flags(parser: argparse._ActionsContainer, *classes: type) -> None:
    """Add a flag per field of the dataclasses; a field that several share becomes one flag.

    A flag that is not given is absent from the namespace, so that what the user said can be told from a default.
    A boolean field that is true by default becomes `--no_NAME`.
    """
    owners: dict[str, tuple[Field[Any], Any]] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            owners.setdefault(f.name, (f, hints[f.name]))
    for name, (f, hint) in owners.items():
        text = f.metadata.get("help", "").replace("%", "%%")
        if hint is bool:
            flag, action = (f"--no_{name}", "store_false") if f.default is True else (f"--{name}", "store_true")
            parser.add_argument(flag, dest=name, action=action, default=argparse.SUPPRESS, help=text)
            continue
        many = typing.get_origin(hint) in (tuple, list)
        scalar = typing.get_args(hint)[0] if many or _is_optional(hint) else hint
        shown = " ".join(map(str, f.default)) if many and f.default is not MISSING else f.default
        if f.default is not MISSING and f.default is not None:
            text += f" (default: {shown})"
        parser.add_argument(
            f"--{name}",
            type=scalar,
            nargs="+" if many else None,
            choices=f.metadata.get("choices"),
            default=argparse.SUPPRESS,
            required=f.default is MISSING,
            metavar=None if f.metadata.get("choices") else scalar.__name__.upper(),
            help=text,
        )


def take(cls: type[T], given: Mapping[str, Any]) -> T:
    """An instance of the dataclass from the flags that were given; defaults for the rest."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    values = {name: given[name] for name in names if name in given}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)

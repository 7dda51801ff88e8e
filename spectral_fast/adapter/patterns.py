"""PEFT's rank_pattern and alpha_pattern: what they say of a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ALL_LAYERS = 10**9  # as the last layer: no limit
MANY = 2000  # patterns, for which PEFT's search takes some ten minutes
_LITERAL = re.compile(r"[\w.-]+")  # in which a dot stands for any character, and nothing else is special


class Patterns:
    """One of the two options, by PEFT's rule: the first pattern that matches the name or its end after a dot.

    Patterns are regular expressions, but where an adapter has thousands they are names. Those are looked up, by their
    length and the places of their dots, which stand for any character: to try each on each name would take minutes.

    Args:
        option: its name, for errors.
        patterns: as in adapter_config.json; None is none.

    Raises:
        ValueError: the option is no mapping, or a pattern is not a regular expression.
    """

    def __init__(self, option: str, patterns: Mapping[str, Any] | None) -> None:
        if not isinstance(patterns, Mapping | None):
            raise ValueError(f"adapter_config.json: {option} must map names of modules to numbers; got {patterns!r}")
        self._all = dict(patterns or {})
        self._values = list(self._all.values())
        self._names: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._others: list[tuple[int, re.Pattern[str]]] = []
        for i, pattern in enumerate(self._all):
            if _LITERAL.fullmatch(pattern):
                dots = tuple(k for k, letter in enumerate(pattern) if letter == ".")
                self._names.setdefault((len(pattern), dots), {})[pattern] = i
            else:
                self._others.append((i, _compiled(pattern, option)))

    def get(self, name: str, default: Any) -> Any:
        """What the option says of a module, named as in the model."""
        found = [i for i, pattern in self._others if pattern.match(name)][:1]
        for (length, dots), table in self._names.items():
            start = len(name) - length
            if start == 0 or (start > 0 and name[start - 1] == "."):
                end = list(name[start:])
                for k in dots:
                    end[k] = "."
                i = table.get("".join(end))
                if i is not None:
                    found.append(i)
        return self._values[min(found)] if found else self._all.get(name, default)


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(f"adapter_config.json: {pattern!r} in {option} is no regular expression: {error}") from error

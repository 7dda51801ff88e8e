"""`--print_config`: a command line as the file that --config reads."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import yaml

from spectral_fast.cli.parser import WIDTH, Parser, word_for

_HEAD = """\
# {prog} --config FILE; flags on the command line win.
# A line that begins with # and a name is a default, or what is not given yet:
# take the # away to say it.
"""


def as_config(parser: Parser, args: argparse.Namespace) -> str:
    """The flags of a command as YAML: those that are given as keys, the others as comments."""
    keys = parser.keys()
    given = {name: value for name, value in vars(args).items() if name in keys and _is_given(parser, name, value)}
    return head(parser) + flags(parser, given)


def head(parser: Parser) -> str:
    """What is said at the top of the file."""
    return _HEAD.format(prog=parser.prog)


def flags(parser: Parser, given: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """A parser's flags, group by group, but those that its file cannot hold."""
    keys, text = {name: action for name, action in parser.keys().items() if name not in without}, ""
    for group in parser._action_groups:
        mine = [action for action in group._group_actions if keys.get(action.dest) is action]
        text += title(group.title or "") if mine else ""
        for action in mine:
            about = _about(parser, action)
            default = given.get(action.dest, parser.fallbacks[action.dest])
            text += entry(action.dest, _wanted(action) if default is None else default, about, action.dest in given)
    return text


def title(text: str) -> str:
    """The line above a group."""
    return f"\n# --- {text} ---\n"


def entry(name: str, value: Any, about: str, given: bool) -> str:
    """A key with what it is about and its value, as a comment if it is not given."""
    words = textwrap.fill(
        " ".join(about.split()), WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False
    )
    line = yaml.dump({name: _plain(value)}, Dumper=_Dumper, width=float("inf"), allow_unicode=True)
    return f"\n{words}\n{'' if given else '#'}{line}"


def _is_given(parser: Parser, name: str, value: Any) -> bool:
    """Flags of dataclasses are absent where they are not given; others have their default."""
    return hasattr(parser.keys()[name], "fallback") or bool(value != parser.fallbacks[name])


def _about(parser: Parser, action: argparse.Action) -> str:
    about = (action.help or "").replace("%%", "%")
    if action.nargs == 0 and not action.const:  # the key of --no_NAME is about what it turns off
        about = about.removeprefix("do not ")
    if action.choices is not None and "one of " not in about:
        about += f"; one of {', '.join(map(str, action.choices))}"
    return f"{about} (required)" if action.dest in parser.required else about


def _wanted(action: argparse.Action) -> Any:
    """A word in the place of a value."""
    word = word_for(action)
    return [word] if action.nargs in ("+", "*") else word


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    known = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """A dumper that keeps every value in the line of its key, which may become a comment."""


def _string(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if len(text.splitlines()) > 1 else None)


_Dumper.add_representer(str, _string)
_Dumper.add_representer(list, lambda dumper, x: dumper.represent_sequence("tag:yaml.org,2002:seq", x, flow_style=True))
_Dumper.add_representer(dict, lambda dumper, x: dumper.represent_mapping("tag:yaml.org,2002:map", x, flow_style=False))

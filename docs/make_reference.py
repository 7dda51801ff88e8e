"""Makes docs/reference from the parser, the dataclasses of settings and what the commands say that they write.

`make reference` runs it; a test tells whether it has to be.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import broken
from spectral_fast.cli.parser import Parser, word_for
from spectral_fast.cli.start import GROUPS, command_line
from spectral_fast.environment import VARIABLES
from spectral_fast.options import bounds

REFERENCE = Path(__file__).parent / "reference"
PACKAGE = Path(__file__).parents[1] / "spectral_fast"
HEAD = "<!-- Made by `make reference`; what stands here by hand is lost. -->\n\n"
# What options.py and commands put at the end of a flag's help.
NOTE = re.compile(
    r" \((?P<range>(?:at least|at most|above|-?[\d.]+ to) [^;()]*)?(?:; )?(?:default: (?P<default>.*))?\)$"
)
COMMON = ("help", "config", "print_config", "json")
STATUSES = {
    "0": "done",
    "1": "the task failed; the message says why. Also: a run of `sweep` failed, a kernel is wrong in `bench`, `diff "
    "--at_most` found more",
    "2": "the command line is wrong; nothing was done",
    "130": "interrupted by Ctrl-C; no file or folder is left half-written",
    "143": "terminated (SIGTERM); as 130",
}


def pages() -> dict[str, str]:
    """File name -> content of every page."""
    commands = list(_commands())
    return {
        "commands.md": HEAD + _about_commands(commands),
        "files.md": HEAD + _about_files(commands),
        "settings.md": HEAD + _about_settings(),
        "environment.md": HEAD + _about_environment(),
    }


def _commands() -> Iterator[tuple[str, Parser]]:
    """Group -> parser of a command, in the order of --help."""
    [chosen] = [a for a in command_line()._actions if isinstance(a, argparse._SubParsersAction)]
    parsers = iter(chosen.choices.values())
    for title, modules in GROUPS.items():
        for _ in modules:
            yield title, next(parsers)


def _about_commands(commands: Sequence[tuple[str, Parser]]) -> str:
    parts = [
        "# Commands",
        "`spectral-fast COMMAND --help` tells the same. Every flag may be spelt with `-` or `_`. A flag that takes "
        "several values takes them with spaces between.",
        _table(
            ("command", "what it does", "group"),
            ((f"[`{_name(p)}`](#{_name(p)})", _text(p.summary), group) for group, p in commands),
        ),
        "## Every command\n\nhas these flags:",
        _flags(action for action in _shown(commands[0][1]) if action.dest in COMMON),
        "and ends with one of these exit statuses:",
        _table(("status", "meaning"), ((code, _text(meaning)) for code, meaning in STATUSES.items())),
    ]
    for _, parser in commands:
        parts += _about_command(parser)
    return "\n\n".join(parts) + "\n"


def _about_command(parser: Parser) -> Iterator[str]:
    yield f"## {_name(parser)}"
    yield _text(re.sub(r"\s+", " ", parser.description or ""))
    yield "```text\n" + re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip() + "\n```"
    yield "\n".join(["```bash", *map(broken, parser.examples), "```"])
    own = [a for a in _shown(parser) if a.dest not in COMMON or (a.dest == "config" and parser.takes_more)]
    first, second, *others = parser._action_groups  # arguments and flags that are in no group of their own
    for title, groups in [("", (first, second)), *((f"**{_text(group.title or '')}**", (group,)) for group in others)]:
        if mine := [action for action in own for group in groups if action in group._group_actions]:
            yield "\n\n".join(filter(None, [title, _flags(mine)]))
    if parser.takes_more:
        yield "Every field of TRL's SFTConfig is a flag of the same name, too."
    if parser.writes:
        yield f"[Files written](files.md#{_name(parser)})"


def _shown(parser: Parser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]


def _flags(actions: Iterable[argparse.Action]) -> str:
    return _table(("flag", "value", "default", "meaning"), map(_flag, actions))


def _flag(action: argparse.Action) -> tuple[str, str, str, str]:
    words = ", ".join(f"`{x}`" for x in action.option_strings) or f"`{action.metavar or action.dest.upper()}`"
    text = (action.help or "").replace("%%", "%")
    choices = [str(choice) for choice in action.choices or ()]
    text = text.removesuffix(f"; one of {', '.join(choices)}")
    found = NOTE.search(text)
    note = found.groupdict() if found else {}
    text = text[: found.start()] if found else text
    value, default = "", _text(note.get("default") or "")
    if action.nargs != 0:
        kind = {"int": "integer", "float": "number"}.get(getattr(action.type, "__name__", ""), word_for(action))
        value = ", ".join(f"`{choice}`" for choice in choices) or kind
        value += f", {note['range']}" if note.get("range") else ""
        value += "; several" if action.nargs in ("+", "*") else ""
    return words, value, "**required**" if action.required else default, _text(text)


def _about_files(commands: Sequence[tuple[str, Parser]]) -> str:
    parts = [
        "# Files",
        "What every command writes. Names are relative to the command's output folder, `--out_dir` (`--output_dir` of "
        "`train`); `*` stands for what varies, a name with `/` at its end for a folder. Folders appear when they are "
        "complete. Numbers are in the units that stand beside them; shares and accuracies are from 0 to 1. JSON is "
        "UTF-8; `.jsonl` has an object per line; CSV has a row of names first.",
    ]
    for _, parser in commands:
        if parser.writes:
            names = {"*": "all other files"}
            rows = ((f"`{names.get(name, name)}`", _text(text)) for name, text in parser.writes.items())
            parts += [f"## {_name(parser)}", _table(("file", "contents"), rows)]
    silent = ", ".join(f"`{_name(parser)}`" for _, parser in commands if not parser.writes)
    return "\n\n".join([*parts, f"{silent} write no file of their own."]) + "\n"


def _about_settings() -> str:
    parts = [
        "# Settings in Python",
        "The dataclasses that the flags are made of: what a command takes as `--calib_samples 8`, Python takes as "
        "`CalibrationOptions(calib_samples=8)`. Values are checked when an instance is made. "
        '`spectral_fast.policies.POLICIES["abs_select"]` is the class of a mode.',
    ]
    for module, name in sorted(_classes()):
        cls = getattr(importlib.import_module(module), name)
        mode = f", mode `{cls.mode}`" if hasattr(cls, "mode") else ""
        about = f"`{module}`{mode}. {_text((cls.__doc__ or '').splitlines()[0])}"
        parts += [
            f"## {name}",
            about,
            _table(("field", "type", "default", "range or choices", "meaning"), _fields(cls)),
        ]
    return "\n\n".join(parts) + "\n"


def _classes() -> Iterator[tuple[str, str]]:
    """Module and name of every dataclass with fields made by `option`, or that inherits them and can be made."""
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        if {"kernels", "cli"} & set(parts):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(line, ast.AnnAssign)
                and isinstance(line.value, ast.Call)
                and getattr(line.value.func, "id", "") == "option"
                for line in node.body
            ):
                yield ".".join(part for part in parts if part != "__init__"), node.name


def _fields(cls: Any) -> Iterator[tuple[str, ...]]:
    for f in fields(cls):
        if "help" in f.metadata:
            allowed = ", ".join(f"`{choice}`" for choice in f.metadata["choices"] or ()) or bounds(f)
            default = f"`{f.default!r}`" + (f" ({_text(shown)})" if (shown := f.metadata["shown"]) else "")
            yield f"`{f.name}`", f"`{str(f.type).replace(' | ', ' or ')}`", default, allowed, _text(f.metadata["help"])


def _about_environment() -> str:
    parts = [
        "# Environment variables",
        "What the package reads of the environment. `spectral-fast info` shows those that are set. Libraries read "
        "theirs: `OMP_NUM_THREADS` (threads of torch and of the native kernels), `HF_HOME` and `HF_HUB_OFFLINE` "
        "(downloads), `CUDA_VISIBLE_DEVICES`.",
        _table(("variable", "meaning"), ((f"`{name}`", _text(text)) for name, text in VARIABLES.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _name(parser: Parser) -> str:
    return parser.prog.partition(" ")[2]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """Words for a cell of a table: what Markdown would take for its own is escaped outside of backticks."""
    parts = text.split("`")
    escaped = [part if i % 2 else re.sub(r"([*<|])", r"\\\1", part) for i, part in enumerate(parts)]
    return "`".join(escaped)


def main() -> None:
    """Write the pages."""
    REFERENCE.mkdir(exist_ok=True)
    for name, content in pages().items():
        (REFERENCE / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()

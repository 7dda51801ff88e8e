"""The commands' parser: short usage, the nearest known word, a file of flags, and one rank that speaks for all."""

from __future__ import annotations

import argparse
import os
import reprlib
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from spectral_fast.calibration.torchrun import launched
from spectral_fast.options import nearest

RANK_0_SPEAKS = 10.0  # seconds after which it surely has
STATUSES = "0 done, 1 failed, 2 wrong command line, 130 interrupted, 143 terminated"
WIDTH = 80
FOLDERS, FILES = ("ADAPTER", "MODEL", "DIR"), ("DATA", "FILE")
# What the value of a flag is: by its name, or by the end of it.
_WORDS = {
    "ADAPTER": ("lora_path", "lora_dir", "first", "second"),
    "MODEL": ("model", "model_name_or_path", "_model"),
    "DIR": ("sensitivity", "baseline", "slora", "_dir"),
    "DATA": ("dataset", "_data", "_dataset_path"),
    "FILE": ("config", "configs", "config_src", "report", "output", "out_json"),
    "COLUMN": ("_column",),
    "SPLIT": ("_split",),
    "SIZE": ("_memory",),
    "TEXT": ("stop", "stop_words", "_stop"),
}
_NUMBERS = {"int": "N", "float": "X"}


class Parser(argparse.ArgumentParser):
    """A parser of which, under torchrun, rank 0 alone says what is wrong with the command line that all have.

    Attributes:
        summary: one short line; of a command, and not of the list of commands.
        examples: complete command lines.
        writes: file names and what is in them.
        again: what to do once the command was interrupted.
        menu: of a command, the parser of all commands.
        computes: the command needs torch, which takes a second to import.
        takes_more: the command reads its --config itself, and flags that are not here.
        config_text: of a command that reads its --config itself: what --print_config prints.
        required: names of flags that must be given, on the command line or in a file.
        fallbacks: name of a flag -> what is taken where it is not given.
    """

    summary: str = ""
    examples: Sequence[str] = ()
    writes: Mapping[str, str] = {}
    again: str = "Run it again."
    menu: Parser | None = None
    computes: bool = True
    takes_more: bool = False
    config_text: Callable[[argparse.Namespace], str] | None = None
    required: frozenset[str] = frozenset()
    fallbacks: Mapping[str, Any] = {}

    def complete(self) -> None:
        """Give the flags what they have in common, once all are there.

        That is a word for their values, and a hidden opposite for switches, so that a command line can undo a file's.
        """
        for action in self._actions:
            if action.nargs != 0 and action.choices is None and action.metavar is None:
                action.metavar = word_for(action) if action.option_strings else action.dest.upper()
            elif action.choices is not None and len(", ".join(map(str, action.choices))) > WIDTH // 2:
                action.metavar = "WORD"
                action.help = f"{action.help}; one of {', '.join(map(str, action.choices))}"
        for action in self.switches():
            [*_, flag] = action.option_strings
            opposite = f"--{flag[5:]}" if flag.startswith("--no_") else f"--no_{flag[2:]}"
            value = "store_false" if action.const else "store_true"
            if opposite not in self._option_string_actions:
                self.add_argument(
                    opposite, dest=action.dest, action=value, default=argparse.SUPPRESS, help=argparse.SUPPRESS
                )
        needed = [action for action in self._actions if action.required and action.nargs != "*"]
        self.required = frozenset(action.dest for action in needed)
        self.fallbacks = {
            name: None if (value := getattr(action, "fallback", action.default)) is MISSING else value
            for name, action in self.keys().items()
        }
        words = [self.prog, *map(_in_usage, needed), "[flags]"]
        unbroken = " ".join(word.replace(" ", "\xa0") for word in words)  # a flag and its value stay together
        self.usage = textwrap.fill(unbroken, WIDTH - len("usage: "), subsequent_indent="    ").replace("\xa0", " ")

    def switches(self) -> Iterator[argparse.Action]:
        """The flags that are told by themselves, without a value."""
        for action in list(self._actions):
            if isinstance(action, argparse._StoreConstAction) and action.help != argparse.SUPPRESS:
                yield action

    def keys(self) -> dict[str, argparse.Action]:
        """What can stand in a file of flags: name -> action."""
        about = (argparse.SUPPRESS, "help", "config", "print_config")
        shown = [a for a in self._actions if a.dest not in about and a.help != argparse.SUPPRESS]
        return {action.dest: action for action in shown}

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Read --config first; its values are defaults, which the command line changes."""
        words = list(sys.argv[1:] if args is None else args)
        own = words[: words.index("--")] if "--" in words else words
        if self.summary and not {"-h", "--help"} & set(own):
            self._prepare(own)
        if not self.summary and own and own[0].startswith("-") and own[0] not in self._option_string_actions:
            self.error(f"the command comes first, then its flags; got {own[0]}")
        return super().parse_known_args(words, namespace)

    def _prepare(self, words: Sequence[str]) -> None:
        asked = "--print_config" in words
        for action in self._actions if asked else ():
            action.required = False
            if not action.option_strings and action.nargs is None:
                action.nargs = "?"
        if self.takes_more:
            return
        for word in words:
            name = word.partition("=")[0]
            if word.startswith("--") and " " not in name and name not in self._option_string_actions:
                known = [flag for action in self.keys().values() for flag in action.option_strings]
                self.error(f"unrecognized arguments: {word}{nearest(name, [*known, '--config', '--print_config'])}")
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", nargs="?")
        if file := first.parse_known_args(words)[0].config:  # nothing is refused below
            self._read(Path(file).expanduser())

    def _read(self, file: Path) -> None:
        from spectral_fast.yamlfile import read_yaml

        try:
            content = read_yaml(file, words=True)
        except (OSError, ValueError) as error:
            self.error(f"--config: {error}")
        if not isinstance(content, dict | None):
            self.error(f"--config: {file} must hold keys and values; got {type(content).__name__}")
        keys = self.keys()
        for name, value in (content or {}).items():
            if name not in keys:
                self.error(f"{file}: unknown key {name!r}{self._key_meant(str(name))}")
            if value is None:
                continue
            try:
                default = self._value(keys[name], value)
            except argparse.ArgumentError as error:
                self.error(f"{file}: {name}: {error.message}")
            for action in self._actions:
                if action.dest == name:
                    action.default, action.required = default, False
                    if not action.option_strings and action.nargs is None:
                        action.nargs = "?"

    def _key_meant(self, name: str) -> str:
        """A hint: a flag by another name, or its opposite, is known; else the nearest key."""
        flag = self._option_string_actions.get(f"--{name.lstrip('-').replace('-', '_')}")
        keys = self.keys()
        return f"; is {flag.dest} meant?" if flag is not None and flag.dest in keys else nearest(name, keys)

    def _value(self, action: argparse.Action, value: Any) -> Any:
        """A value of a file as the flag's own; checked as that is."""
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise argparse.ArgumentError(action, f"must be true or false; got {value!r}")
            return value
        many = action.nargs in ("+", "*")
        items = value if many and isinstance(value, list) else [value]
        if action.nargs == "+" and not items:
            raise argparse.ArgumentError(action, "must have one value or more; got none")
        values = []
        for item in items:
            if not isinstance(item, str):
                wanted = "words and numbers" if many else "one word or number"
                raise argparse.ArgumentError(
                    action, f"must be {wanted}, in quotes if YAML reads more; got {reprlib.repr(item)}"
                )
            values.append(self._get_value(action, item))
            self._check_value(action, values[-1])
        return values if many else values[0]

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if word_for(action) in FOLDERS + FILES:
            if not arg_string:  # as of a variable that is not set; as a path it would be the folder one is in
                raise argparse.ArgumentError(action, "must not be empty")
            if (arg_string + "/").startswith("~/"):  # shells leave --flag=~ alone
                arg_string = str(Path(arg_string).expanduser())
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            listed = "" if action.dest == "command" else f"; choose from {', '.join(known)}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{nearest(str(value), known)}{listed}")

    def error(self, message: str) -> NoReturn:
        """End with status 2, and the message."""
        if launched() and os.environ["RANK"] != "0":
            # torchrun ends all ranks once one has ended: rank 0 shall have spoken before.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
            time.sleep(RANK_0_SPEAKS)
            sys.exit(2)
        self.print_usage(sys.stderr)
        told = "flags" if self.summary else "commands"
        self.exit(2, f"{self.prog}: error: {message}\nrun `{self.prog} --help` for all {told}\n")


def word_for(action: argparse.Action) -> str:
    """What the value of a flag is, in a word such as DIR."""
    number = _NUMBERS.get(getattr(action.type, "__name__", ""))
    if number is not None:
        return number
    for word, names in _WORDS.items():
        if any(action.dest == name or (name[0] == "_" and action.dest.endswith(name)) for name in names):
            return word
    return "NAME"


def _in_usage(action: argparse.Action) -> str:
    flag = f"{action.option_strings[0]} " if action.option_strings else ""
    word = str(action.metavar or "|".join(map(str, action.choices or ())))
    return flag.strip() if action.nargs == 0 else f"{flag}{word}{' ...' * (action.nargs == '+')}"

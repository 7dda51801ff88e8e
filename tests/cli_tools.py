"""Command lines for tests of the command line itself."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from spectral_fast.cli import main
from spectral_fast.cli.parser import Parser
from spectral_fast.cli.start import command_line


def commands() -> dict[str, Parser]:
    """Name -> parser, new ones."""
    [found] = [action for action in command_line()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


NAMES = tuple(commands())
OWN_CONFIG = "train"  # whose file has keys that are not its parser's


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What is said of a command line that is wrong."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    return str(err)


def parsed(*argv: str) -> dict[str, Any]:
    """The flags of a command line."""
    args, rest = command_line().parse_known_args(argv)
    assert not rest
    return {name: value for name, value in vars(args).items() if name not in ("parser", "config", "print_config")}

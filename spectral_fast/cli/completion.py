"""`completion`: commands and flags by the tab key."""

from __future__ import annotations

import argparse
from typing import Any

from spectral_fast.cli.common import add_command
from spectral_fast.cli.parser import FILES, FOLDERS, Parser, word_for

_INSTALL = {"bash": "~/.spectral-fast.bash", "zsh": "~/.zfunc/_spectral-fast", "tcsh": "~/.spectral-fast.tcsh"}


def add(commands: Any) -> Parser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "completion",
        _run,
        "print a script that completes commands and flags",
        "Print a script that completes commands, flags, choices, files and folders by the tab key. Save it as in the "
        "examples, and add a line to what the shell reads when it starts: for bash `source ~/.spectral-fast.bash` to "
        "~/.bashrc, for tcsh `source ~/.spectral-fast.tcsh` to ~/.tcshrc, for zsh `fpath+=(~/.zfunc)` to ~/.zshrc, "
        "above `compinit`. Then open a new shell. Print it again after an upgrade.",
        examples=[f"spectral-fast completion {shell} > {file}" for shell, file in _INSTALL.items()],
    )
    parser.computes = False
    parser.add_argument("shell", choices=list(_INSTALL), help="shell that is to complete: bash, zsh or tcsh")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import shtab

    parser = args.parser.menu
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    commands.help = "command"  # shtab leaves out what help does not show
    for command in commands.choices.values():
        for action in command._actions:
            word = word_for(action) if action.nargs != 0 else ""
            if word in FOLDERS + FILES:
                action.complete = shtab.FILE if word in FILES else shtab.DIRECTORY
    script = shtab.complete(parser, shell=args.shell)
    # Of a name with spaces bash gives what is typed: my\ folder.
    script = script.replace(" -- $1 ", ' -- "${1//\\\\/}" ')
    return {"shell": args.shell, "script": script}, script

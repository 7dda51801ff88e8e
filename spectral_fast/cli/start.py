"""From a command line to the end of its command: the parser of all commands, the run, and what is told of errors."""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spectral_fast._version import __version__
from spectral_fast.calibration.torchrun import launched
from spectral_fast.cli import (
    active_channels,
    analyze,
    bench,
    clip,
    completion,
    demo,
    diff,
    edit,
    evaluate,
    export,
    extract,
    humaneval,
    info,
    inspect,
    lm_eval,
    merge,
    predictors,
    probe,
    prune,
    prune_finetune,
    push,
    ranks,
    resize,
    sweep,
    toy,
    train,
)
from spectral_fast.cli.interrupts import stoppable, told, work_begins
from spectral_fast.cli.parser import STATUSES, Parser
from spectral_fast.usage import UsageError, check_places

GROUPS = {
    "adapters": (probe, edit, inspect, diff, merge, resize, prune, clip, export, push),
    "evaluation": (evaluate, humaneval, lm_eval, sweep),
    "base models and training": (extract, ranks, train, analyze),
    "study": (toy, predictors, prune_finetune, active_channels),
    "this machine": (demo, info, bench, completion),
}


def start(argv: Sequence[str] | None = None) -> int:
    """As `spectral_fast.cli.main`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the locale lacks Δ or ±
    words = list(sys.argv[1:] if argv is None else argv)
    args, rest = command_line().parse_known_args(_with_underscores(words))
    if rest and not args.parser.takes_more:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    if args.command not in ("info", "bench"):  # which tell of the environment as they found it
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with stoppable():
            return _run(args)
    except BrokenPipeError:  # the reader went away; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UsageError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt as stopped:
        message, status = told(stopped, args)
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("SPECTRAL_FAST_DEBUG"):
            raise
        message, status = f"error: {_words(error)}", 1
    print(f"spectral-fast {args.command}: {message}", file=sys.stderr)
    return status


def _words(error: Exception) -> str:
    """What went wrong; of the system's errors the file and the reason, as its tools say it, without "[Errno 17]"."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        files = [str(file) for file in (error.filename, error.filename2) if file is not None]
        return f"{' -> '.join(files)}: {error.strerror}"
    return str(error)


def _run(args: argparse.Namespace) -> int:
    if args.command != "probe" and launched():
        raise UsageError("torchrun is for `probe` only; run this once, without it")
    if args.print_config:
        from spectral_fast.cli.config import as_config

        print(args.parser.config_text(args) if args.parser.config_text else as_config(args.parser, args), end="")
        return 0
    check_places(args)
    if args.parser.computes:
        import torch  # noqa: F401

        # What this has left: looking through it again and again takes a third of a second in a large edit.
        gc.freeze()
    work_begins()
    done = args.run(args)
    if done is None:  # a rank that another speaks for
        return 0
    result, text = done
    print(json.dumps(result, indent=2) if args.json else text, flush=True)
    return 1 if result.get("failures") else 0


def _with_underscores(words: Sequence[str]) -> list[str]:
    """--until-stable=0.9 as --until_stable=0.9: every flag may be spelt with either. What is after -- is not ours."""
    end = words.index("--") if "--" in words else len(words)
    return [*map(_with_underscore, words[:end]), *words[end:]]


def _with_underscore(word: str) -> str:
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def command_line() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="spectral-fast",
        usage="spectral-fast COMMAND [flags]",
        description="Measure, edit and evaluate the singular values of LoRA adapters.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"spectral-fast {__version__}")
    # Python's own list of commands has no groups: they are in the text below.
    commands = parser.add_subparsers(
        prog=parser.prog, dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    text = []
    for title, modules in GROUPS.items():
        text.append(f"{title}:")
        for module in modules:
            command = module.add(commands)
            _add_common_flags(command)
            command.menu = parser
            text.append(f"  {command.prog.removeprefix(parser.prog).strip():<16}  {command.summary}")
        text.append("")
    text += [
        "exit status:",
        f"  {STATUSES}",
        "",
        "spectral-fast COMMAND --help tells a command's flags and gives examples.",
    ]
    parser.epilog = "\n".join(text)
    return parser


def _add_common_flags(command: Parser) -> None:
    group = command.add_argument_group("this command line")
    if "--config" not in command._option_string_actions:
        group.add_argument("--config", type=Path, help="YAML of flags, as --print_config prints; flags here win")
    group.add_argument("--print_config", action="store_true", help="print all flags as such a file, and do nothing")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")
    command.set_defaults(parser=command)
    command.complete()

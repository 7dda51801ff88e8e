"""`spectral-fast …`: flags to calls, results to text or JSON; a module per command. Only this package prints."""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from spectral_fast._version import __version__
from spectral_fast.calibration.ranks import launched
from spectral_fast.cli import (
    active_channels,
    analyze,
    bench,
    clip,
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
from spectral_fast.usage import UsageError

RANK_0_SPEAKS = 10.0  # seconds after which it surely has


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 the task failed, 2 the command line is wrong."""
    # What torch's import has left: looking through it again and again takes a third of a second in a large edit.
    gc.freeze()
    parser = _parser()
    words = [_with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    args, rest = parser.parse_known_args(words)
    if rest and args.command != "train":  # which has the fields of TRL's SFTConfig as flags, too
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if args.command != "probe" and launched():
            raise UsageError("torchrun is for `probe` only; run this once, without it")
        done = args.run(args)
        if done is None:  # a rank that another speaks for
            return 0
        result, text = done
        print(json.dumps(result, indent=2) if args.json else text, flush=True)
        return 1 if result.get("failures") else 0
    except BrokenPipeError:  # the reader went away; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt:
        print(
            f"spectral-fast {args.command}: interrupted; no file or folder is left half-written",
            file=sys.stderr,
        )
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("SPECTRAL_FAST_DEBUG"):
            raise
        print(f"spectral-fast {args.command}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _with_underscores(word: str) -> str:
    """--until-stable=0.9 as --until_stable=0.9: every flag may be spelt with either."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


class _Parser(argparse.ArgumentParser):
    """A parser of which, under torchrun, rank 0 alone says what is wrong with the command line that all have."""

    def error(self, message: str) -> NoReturn:
        if launched() and os.environ["RANK"] != "0":
            # torchrun ends all ranks once one has ended: rank 0 shall have spoken before.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
            time.sleep(RANK_0_SPEAKS)
            sys.exit(2)
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="spectral-fast",
        description="Measure, edit and evaluate the singular values of LoRA adapters, without retraining.",
    )
    parser.add_argument("--version", action="version", version=f"spectral-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        edit,
        prune,
        resize,
        clip,
        export,
        merge,
        extract,
        inspect,
        diff,
        probe,
        evaluate,
        humaneval,
        lm_eval,
        sweep,
        push,
        ranks,
        train,
        analyze,
        toy,
        predictors,
        prune_finetune,
        active_channels,
        demo,
        bench,
        info,
    ):
        command = module.add(commands)
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
        command.set_defaults(parser=command)
    return parser

"""Ctrl-C and SIGTERM: both end a command as an exception does, so that nothing is left half-written."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spectral_fast.calibration.torchrun import launched
from spectral_fast.cli import leave
from spectral_fast.cli.common import unfinished


class Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems send before they kill."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the context SIGTERM is a `Terminated`, unless somebody else has a handler.

    Under torchrun `join` has one: there the ranks tell each other why they end.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        and not launched()
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def work_begins() -> None:
    """From now on Ctrl-C is Python's exception again, if `main` has changed that."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _terminated(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: it shall not end the tidying up
    raise Terminated


def told(stopped: KeyboardInterrupt, args: argparse.Namespace) -> tuple[str, int]:
    """What the user is told, and the exit status as a shell has it: 128 and the signal's number."""
    word, number = ("terminated", signal.SIGTERM) if isinstance(stopped, Terminated) else ("interrupted", signal.SIGINT)
    again = args.parser.again
    out_dir = getattr(args, "out_dir", None)
    if out_dir is not None and unfinished(out_dir).exists():
        again = "The same command with --resume goes on from here."
    elif (
        getattr(args, "overwrite", None) is False
        and out_dir is not None
        and out_dir.is_dir()
        and any(out_dir.iterdir())
    ):
        again = f"{out_dir} is there already: run it again with --overwrite, or name another --out_dir."
    return f"{word}; no file or folder is left half-written. {again}", 128 + number

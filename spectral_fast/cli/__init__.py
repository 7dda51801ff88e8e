"""`spectral-fast …`: flags to calls, results to text or JSON; a module per command. Only this package prints."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; by default those of this process, which Ctrl-C then ends at once until the work begins.

    Returns:
        The exit status: 0 done, 1 the task failed, 130 interrupted, 143 terminated.

    Raises:
        SystemExit: with 2 if the command line is wrong, with 0 after --help.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    from spectral_fast.cli.start import start  # not before: what it imports takes longer than all above

    return start(argv)


def leave(*_: Any) -> None:
    """End this process; an exception may get lost in the import of torch, and leave numpy half there."""
    os.write(2, b"spectral-fast: interrupted; nothing was begun\n")
    os._exit(128 + signal.SIGINT)

"""`spectral-fast`, and `python -m spectral_fast`."""

import os
import signal
import sys


def main() -> int:
    """Run a command; Ctrl-C while libraries are imported ends it without a traceback, since nothing has begun."""
    begins = signal.getsignal(signal.SIGINT)
    if begins == signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from spectral_fast.cli import main as run

    signal.signal(signal.SIGINT, begins)
    return run()


if __name__ == "__main__":
    sys.exit(main())

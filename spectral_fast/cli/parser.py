"""The commands' parser: help that fits 80 columns, and one rank that speaks for all."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from spectral_fast.calibration.ranks import launched

RANK_0_SPEAKS = 10.0  # seconds after which it surely has
STATUSES = "0 done, 1 the task failed, 2 the command line is wrong, 130 interrupted"


class Parser(argparse.ArgumentParser):
    """A parser of which, under torchrun, rank 0 alone says what is wrong with the command line that all have.

    Attributes:
        summary: one short line.
        examples: complete command lines.
        writes: file names and what is in them.
    """

    summary: str = ""
    examples: Sequence[str] = ()
    writes: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        """End with status 2, and the message."""
        if launched() and os.environ["RANK"] != "0":
            # torchrun ends all ranks once one has ended: rank 0 shall have spoken before.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
            time.sleep(RANK_0_SPEAKS)
            sys.exit(2)
        super().error(message)

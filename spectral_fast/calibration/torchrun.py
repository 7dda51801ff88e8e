"""Whether torchrun started this process."""

from __future__ import annotations

import os

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def launched() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in ENVIRONMENT)

"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run as Python; it wants to know before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A background job of a shell ignores Ctrl-C, as do its children; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Not through sys.path: the root holds `kernels/`, too, which must not be importable by that name.
_spec = spec_from_file_location("benchmarks", Path(__file__).resolve().parents[1] / "benchmarks" / "__init__.py")
assert _spec is not None
sys.modules["benchmarks"] = module_from_spec(_spec)


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Folder with the real GSM8K as train.jsonl and test.jsonl; skips where there is none."""
    folder = Path(os.environ.get("SPECTRAL_FAST_GSM8K", "no such folder"))
    if not (folder / "train.jsonl").is_file():
        pytest.skip("no GSM8K here; set SPECTRAL_FAST_GSM8K to a folder with train.jsonl and test.jsonl")
    return folder

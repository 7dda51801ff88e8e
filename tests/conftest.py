"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Folder with the real GSM8K as train.jsonl and test.jsonl; skips where there is none."""
    folder = Path(os.environ.get("SPECTRAL_FAST_GSM8K", "no such folder"))
    if not (folder / "train.jsonl").is_file():
        pytest.skip("no GSM8K here; set SPECTRAL_FAST_GSM8K to a folder with train.jsonl and test.jsonl")
    return folder

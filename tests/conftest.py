"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Folder with the real GSM8K as train.jsonl and test.jsonl; skips where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
    folder = Path(os.environ.get("SPECTRAL_FAST_GSM8K", default))
    if not (folder / "train.jsonl").is_file():
        pytest.skip(f"no GSM8K at {folder}; set SPECTRAL_FAST_GSM8K to a folder with train.jsonl and test.jsonl")
    return folder

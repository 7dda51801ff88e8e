"""One engine for all tests here: it takes a while to start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spectral_fast import embedded
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.evaluation.engines import Engine, EngineOptions, open_engine


def opened(name: str) -> Engine:
    options = EngineOptions(engine=name, batch_size=64, max_loras=8)
    return open_engine(str(embedded.base_model_dir()), ModelOptions(), options, [embedded.adapter_dir()])


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """vLLM with the embedded model, for adapters of up to the embedded one's rank, 8 at once."""
    with opened("vllm") as vllm:
        yield vllm


@pytest.fixture(scope="session")
def peer() -> Iterator[Any]:
    """The same by transformers."""
    with opened("transformers") as transformers:
        yield transformers

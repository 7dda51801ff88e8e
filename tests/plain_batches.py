"""The plain way to calibrate, for comparison: padded batches in order, and the mean loss of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_fast.calibration.data import IGNORED, Example
from spectral_fast.calibration.packed.decoder import Decoder
from spectral_fast.calibration.packed.packing import packs


@dataclass(frozen=True)
class Batch:
    """Right-padded examples. Token ids, mask and labels are (batch, length), int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def nominal_batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """The examples in order, `batch_size` at a time, padded on the right."""
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        shape = len(chunk), max(len(example.ids) for example in chunk)
        batch = Batch(torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, IGNORED))
        for row, example in enumerate(chunk):
            n = len(example.ids)
            batch.input_ids[row, :n] = torch.tensor(example.ids)
            batch.attention_mask[row, :n] = 1
            batch.labels[row, :n] = torch.tensor(example.labels)
        yield batch


def calibration_loss(model: Any, examples: Sequence[Example], batch_size: int) -> float:
    """The loss that calibration differentiates: the sum of the batches' mean losses."""
    decoder = Decoder(model)
    with torch.no_grad():
        laid_out = packs(examples, batch_size, layout="padded")
        return sum(decoder.loss_gradient(decoder.hidden(pack), pack)[0] for pack in laid_out)

"""The mean token loss of a batch, with logits formed only where some sample has a label."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_fast.calibration.data import IGNORED, Batch


def mean_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy over the labels of a batch, in float32; a scalar.

    The logits at position t predict the label at t + 1. Models that take `logits_to_keep` form them only at columns
    where some sample of the batch has a label.
    """
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _takes_logits_to_keep(model):
        columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
        targets = targets[:, columns]
        inputs["logits_to_keep"] = columns
    logits: Tensor = model(**inputs).logits
    labelled = targets != IGNORED
    chosen = logits[labelled]
    return F.cross_entropy(chosen.to(torch.promote_types(chosen.dtype, torch.float32)), targets[labelled])


def _takes_logits_to_keep(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters

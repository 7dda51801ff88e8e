"""The two passes by their definitions; sums in float32, or in float64 where the input is."""

from __future__ import annotations

import torch
from torch import Tensor


def top_logits(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A full logsumexp and a stable sort of every row, in which equal logits stay in the order of their ids."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = wide.argsort(dim=1, descending=True, stable=True)[:, :top_k].sort(1).values
    values = wide.gather(1, ids)
    gold = wide.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, -torch.inf)
    ignored = labels == -100
    return (
        wide.logsumexp(1).masked_fill(ignored, 0),
        gold.masked_fill(ignored, 0),
        values.masked_fill(ignored[:, None], 0),
        ids.masked_fill(ignored[:, None], 0),
    )


def tensor_sketch(
    hidden: Tensor, logsumexp: Tensor, gold: Tensor, values: Tensor, ids: Tensor, labels: Tensor,
    bucket_h: Tensor, sign_h: Tensor, bucket_e: Tensor, sign_e: Tensor, m: int,
) -> Tensor:  # fmt: skip
    """The sketch of the errors at the largest logits and at the labels."""
    errors, ids = sparse_errors(logsumexp, gold, values, ids, labels)
    hidden = hidden.masked_fill((labels == -100)[:, None], 0)
    return convolved(hidden, errors * sign_e[ids], bucket_e[ids], bucket_h, sign_h, m)


def sparse_errors(
    logsumexp: Tensor, gold: Tensor, values: Tensor, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The errors and their ids, (tokens, k + 1): zero where the label is −100, and at one that is there already."""
    at_gold = ids == labels[:, None]
    errors = (values - logsumexp[:, None]).exp() - at_gold.to(values.dtype)
    beside = ((gold - logsumexp).exp() - 1).masked_fill(at_gold.any(1), 0)
    errors = torch.cat([errors, beside[:, None]], 1).masked_fill((labels == -100)[:, None], 0)
    return errors, torch.cat([ids, labels.clamp(min=0)[:, None]], 1)


def convolved(hidden: Tensor, errors: Tensor, buckets: Tensor, bucket_h: Tensor, sign_h: Tensor, m: int) -> Tensor:
    """Products of spectra, summed over the tokens, and one inverse transform of the sum."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    s_h = torch.zeros(len(hidden), m, dtype=wide, device=hidden.device)
    s_h.index_add_(1, bucket_h.long(), hidden.to(wide) * sign_h)
    s_e = torch.zeros_like(s_h).scatter_add_(1, buckets.long(), errors.to(wide))
    z: Tensor = torch.fft.irfft((torch.fft.rfft(s_h) * torch.fft.rfft(s_e)).sum(0), n=m)
    return z

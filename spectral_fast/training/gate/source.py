"""The original's sketch of a gradient, kept so that what differs can be measured.

Probabilities are a softmax over the K largest logits and the label's alone. A label that is among the K largest is
there twice: it counts twice in the softmax, and 1 is subtracted from both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_fast.kernels.head_sketch import Hashes


def head_sketch(hidden: Tensor, logits: Tensor, labels: Tensor, hashes: Hashes, top_k: int) -> Tensor:
    """Σ over the tokens of TensorSketch(h_t, e_t), (m,) float32; arguments as those of the kernel."""
    kept = labels >= 0
    h, scores, gold = hidden[kept].float(), logits[kept].float(), labels[kept, None]
    ids = torch.cat([scores.topk(top_k).indices, gold], 1)
    errors = scores.gather(1, ids).softmax(1) - (ids == gold).float()
    s_h = h.new_zeros(len(h), hashes.m).index_add_(1, hashes.bucket_h, h * hashes.sign_h)
    s_e = h.new_zeros(len(h), hashes.m).scatter_add_(1, hashes.bucket_e[ids].long(), errors * hashes.sign_e[ids])
    product = (torch.fft.rfft(s_h) * torch.fft.rfft(s_e)).sum(0)
    z: Tensor = torch.fft.irfft(product, n=hashes.m)
    return z

"""The random functions of a TensorSketch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hashes:
    """Two CountSketches: a bucket below m and a sign for every hidden feature and every vocabulary id.

    Attributes:
        bucket_h: (hidden features,) int32.
        sign_h: (hidden features,) float32, of −1 and 1.
        bucket_e: (vocabulary,) int32.
        sign_e: (vocabulary,) float32, of −1 and 1.
        m: length of the sketch.
    """

    bucket_h: Tensor
    sign_h: Tensor
    bucket_e: Tensor
    sign_e: Tensor
    m: int

    @classmethod
    def draw(cls, d_hidden: int, vocab_size: int, m: int, seed: int) -> Hashes:
        """Independent hashes, on the CPU: those of h by a generator seeded with `seed`, those of e with `seed` + 1.

        Args:
            d_hidden: number of hidden features.
            vocab_size: number of vocabulary ids, as many as there are logits.
            m: length of the sketch; any, not only powers of 2.
            seed: the same one gives the same hashes on every machine.

        Raises:
            ValueError: a size is not positive.
        """
        for name, size in (("d_hidden", d_hidden), ("vocab_size", vocab_size), ("m", m)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        return cls(*_drawn(d_hidden, m, seed), *_drawn(vocab_size, m, seed + 1), m)

    def to(self, device: torch.device | str) -> Hashes:
        """The same hashes on a device."""
        return replace(
            self,
            bucket_h=self.bucket_h.to(device),
            sign_h=self.sign_h.to(device),
            bucket_e=self.bucket_e.to(device),
            sign_e=self.sign_e.to(device),
        )


def _drawn(size: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(0, m, (size,), generator=generator)
    signs = 2 * torch.randint(0, 2, (size,), generator=generator) - 1
    return buckets.to(torch.int32), signs.to(torch.float32)

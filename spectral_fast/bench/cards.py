"""Public peaks of GPUs, for bounds: dense, without sparsity, as the vendors print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Card(NamedTuple):
    """What a GPU can do at most, by its vendor.

    Attributes:
        name: that torch.cuda.get_device_name contains.
        bandwidth: bytes per second of its memory.
        bfloat16: flops per second of matrix units, dense; the same for float16.
        float32: flops per second outside of matrix units.
        float64: flops per second, of matrix units where they are faster.
        source: where these stand.
    """

    name: str
    bandwidth: float
    bfloat16: float
    float32: float
    float64: float
    source: str

    def bound(self, nbytes: int, flops: Mapping[str, int]) -> float:
        """Seconds that the bytes or the flops take at least, whichever is more.

        Args:
            nbytes: that must be read and written.
            flops: by what they run on: "bfloat16", "float32" or "float64". Different units may work at once.
        """
        peaks = self._asdict()
        return max([nbytes / self.bandwidth, *(count / float(peaks[unit]) for unit, count in flops.items())])


CARDS = (
    Card("A100", 2.039e12, 312e12, 19.5e12, 19.5e12, "NVIDIA A100 datasheet, A100 80GB SXM"),
    Card("H100", 3.35e12, 989.4e12, 66.9e12, 66.9e12, "NVIDIA H100 datasheet, H100 SXM"),
    Card("H200", 4.8e12, 989.4e12, 66.9e12, 66.9e12, "NVIDIA H200 datasheet, H200 SXM"),
    Card("B200", 8e12, 2250e12, 80e12, 40e12, "NVIDIA Blackwell architecture technical brief, HGX B200"),
    Card("MI300X", 5.3e12, 1307.4e12, 163.4e12, 163.4e12, "AMD Instinct MI300X data sheet"),
)


def card(device: str) -> Card | None:
    """The card of that device name, if its peaks are known: variants with less memory or power are others."""
    lesser = ("PCI", "NVL", "40GB", "64GB", "GH200", "GB200")
    if any(mark in device for mark in lesser):
        return None
    return next((card for card in CARDS if card.name in device), None)

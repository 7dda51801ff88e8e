"""Channels of LoRA layers in a model that are zero and stay so while the rest is trained."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectral_fast.toolbox.measures import channel_energy
from spectral_fast.toolbox.options import PruneOptions


class ChannelMask:
    """The pruned channels of every LoRA layer of a PEFT model: rows of A and columns of B.

    Making it sets them to zero and masks the gradients of both factors. With a fresh AdamW that keeps them at zero;
    moments from before pruning would move them, so `apply` is to be called after each optimizer step.

    Args:
        model: PEFT model; its linear LoRA layers are pruned, each on its own.
        options: score and share of the channels.
        adapter_name: which adapter.

    Attributes:
        kept: name of the layer -> (r,) bool.

    Raises:
        ValueError: the model has no such layer, or one has NaN or infinity, named.
    """

    def __init__(self, model: nn.Module, options: PruneOptions, adapter_name: str = "default") -> None:
        self.kept: dict[str, Tensor] = {}
        self._pruned: list[tuple[nn.Parameter, Tensor]] = []
        score = options.scorer()
        for name, b, a in factors(model, adapter_name):
            if not channel_energy(b, a).isfinite().all():
                raise ValueError(f"{name} has NaN or infinite values: the training diverged, try a smaller --lr")
            self.kept[name] = kept = options.kept(score(b, a))
            for factor, pruned in ((a, ~kept[:, None]), (b, ~kept[None, :])):
                mask = pruned.to(factor.device)
                self._pruned.append((factor, mask))
                factor.register_hook(partial(_masked, mask))  # type: ignore[no-untyped-call]
        if not self.kept:
            raise ValueError(f"the model has no linear LoRA layer of an adapter {adapter_name!r}")
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned channels to zero again."""
        for factor, pruned in self._pruned:
            factor.masked_fill_(pruned, 0.0)


def _masked(pruned: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(pruned, 0.0)


def factors(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Name, B (m, r) and A (r, n) of every linear LoRA layer."""
    for name, module in model.named_modules():
        layer: Any = module
        if adapter_name in getattr(layer, "lora_A", ()):
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            if a.ndim == 2:
                yield name, b, a

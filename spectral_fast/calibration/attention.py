"""Causal attention within each sample of a packed row, for transformers' models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_fast.calibration.products import float32_is_faster

NAME = "spectral_fast_packed"


class Unpackable(Exception):
    """The model cannot take several samples in one row; its message says why."""


@contextmanager
def packed_attention(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the model's attention keeps to the samples whose bounds the pass names.

    They are given to the trunk as `sample_starts=[0, …, tokens]`, which it hands on to its layers.

    Args:
        model: a transformers causal language model.
        layers: its decoder layers, of which each must call the attention.

    Raises:
        Unpackable: if the model does not choose its attention by transformers' interface or mixes tokens otherwise,
            at once or when a layer is run.
    """
    from transformers import AttentionInterface, PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in models:
        if not part._supports_attention_backend:
            raise Unpackable(f"{type(part).__name__} does not use transformers' attention interface")
        if getattr(part, "_is_stateful", False) or any(isinstance(m, nn.Conv1d) for m in part.modules()):
            raise Unpackable(f"{type(part).__name__} mixes tokens by more than attention")
    calls = 0

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        nonlocal calls
        calls += 1
        return _attention(*args, **kwargs)

    def check(layer: nn.Module, *_: Any) -> None:
        nonlocal calls
        if calls == 0:
            raise Unpackable(f"a {type(layer).__name__} mixes tokens without transformers' attention interface")
        calls = 0

    AttentionInterface.register(NAME, attention)
    before = [(config, config._attn_implementation) for config in {id(m.config): m.config for m in models}.values()]
    hooks = [layer.register_forward_hook(check) for layer in layers]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for hook in hooks:
            hook.remove()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sample_starts: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface wants it: query (1, heads, tokens, d) to (1, tokens, heads, d).

    Raises:
        Unpackable: for what scaled_dot_product_attention has not (soft caps, sinks, position biases), and where the
            model did not hand on the bounds of its samples.
    """
    if sample_starts is None or attention_mask is not None or kwargs.get("is_causal") is False:
        raise Unpackable(f"{type(module).__name__} is not told the bounds of the samples")
    if odd := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise Unpackable(f"{type(module).__name__} has {odd[0]}")
    narrow = query.dtype
    if query.device.type == "cpu" and narrow in (torch.bfloat16, torch.float16) and float32_is_faster():
        query, key, value = query.float(), key.float(), value.float()
    lengths = [end - start for start, end in pairwise(sample_starts)]
    outputs = []
    for q, k, v in zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True):
        near = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            near = _band(q.shape[2], sliding_window, q)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=near, is_causal=near is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1).to(narrow), None


def _band(length: int, window: int, like: Tensor) -> Tensor:
    """Token t sees itself and the window - 1 tokens before it. (length, length) bool."""
    return torch.ones(length, length, dtype=torch.bool, device=like.device).tril().triu(1 - window)

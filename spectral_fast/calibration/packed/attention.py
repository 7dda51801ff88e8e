"""Attention within each sample of a packed row, for transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_fast.calibration.packed.products import float32_is_faster

NAME = "spectral_fast_packed"
# What models hand to their attention that changes nothing here; `sliding_window` is in the mask already.
HARMLESS = {
    *("dropout", "is_causal", "sliding_window", "position_ids", "position_embeddings", "use_cache", "cache_position"),
    *("past_key_values", "layer_past", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}
_CALLED, _CAUSAL_ROWS = "_spectral_fast_called", "_spectral_fast_causal_rows"
_starts: ContextVar[Sequence[int] | None] = ContextVar("sample_starts", default=None)


class Unpackable(Exception):
    """The model cannot take several samples in one row; its message says why."""


@contextmanager
def packed_attention(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the model's attention keeps to the samples that `keeping_apart` names.

    Args:
        model: a transformers causal language model.
        layers: its decoder layers, of which each must call the attention.

    Raises:
        Unpackable: if the model does not choose its attention by transformers' interface or mixes tokens otherwise,
            at once or when a layer is run.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in models:
        if not part._supports_attention_backend:
            raise Unpackable(f"{type(part).__name__} does not use transformers' attention interface")
        if getattr(part, "_is_stateful", False) or any(isinstance(m, nn.Conv1d) for m in part.modules()):
            raise Unpackable(f"{type(part).__name__} mixes tokens by more than attention")
        if getattr(part.config, "index_topk", None):
            raise Unpackable(f"{type(part).__name__} chooses tokens by an index of its own")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    before = [(config, config._attn_implementation) for config in {id(m.config): m.config for m in models}.values()]
    hooks = [layer.register_forward_hook(_check_called) for layer in layers]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for hook in hooks:
            hook.remove()


@contextmanager
def keeping_apart(starts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Within the context a trunk in `packed_attention` may be run on samples with these bounds, [0, …, tokens].

    Yields:
        Arguments for the trunk, which hands them on to its layers.
    """
    token = _starts.set(starts)
    try:
        yield {"sample_starts": starts}
    finally:
        _starts.reset(token)


def _mask(*, mask_function: Callable[..., Any], use_vmap: bool = False, device: Any = "cpu", **_: Any) -> Tensor | None:
    """What transformers' mask interface asks for: which tokens each token of a row sees. None if plainly causal.

    Here of the longest sample, (1, 1, longest, longest) bool, which begins with that of any other; it carries up to
    what length samples are causal.
    """
    starts = _starts.get()
    if starts is None or use_vmap:
        raise Unpackable("the model has masks of its own")
    zero = torch.zeros((), dtype=torch.long, device=device)
    masks = []
    for start, end in pairwise(starts):
        places = torch.arange(start, end, device=device)
        seen = mask_function(zero, zero, places[:, None], places[None, :])
        masks.append(torch.as_tensor(seen, device=device).expand(end - start, end - start))
    longest = max(masks, key=len)
    if not all(torch.equal(mask, longest[: len(mask), : len(mask)]) for mask in masks):
        raise Unpackable("what the model's tokens see depends on where their sample stands in the row")
    causal = (longest == torch.ones_like(longest).tril()).all(1)
    if causal.all():
        return None
    mask = longest[None, None]
    setattr(mask, _CAUSAL_ROWS, int(causal.long().cumprod(0).sum()))
    return mask


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sample_starts: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface wants it: query (1, heads, tokens, d) to (1, tokens, heads, d).

    Raises:
        Unpackable: for what is not known to be done by scaled_dot_product_attention (soft caps, sinks, indices), for
            masks that are not `_mask`'s, and where the model did not hand on the bounds of its samples.
    """
    name = type(module).__name__
    if sample_starts is None or (attention_mask is not None and not hasattr(attention_mask, _CAUSAL_ROWS)):
        raise Unpackable(f"{name} is not told the bounds of the samples")
    if odd := [key for key, value in kwargs.items() if value is not None and key not in HARMLESS]:
        raise Unpackable(f"{name} has {odd[0]}")
    setattr(module, _CALLED, True)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal_rows: int = getattr(attention_mask, _CAUSAL_ROWS, 0)
    narrow = query.dtype
    if query.device.type == "cpu" and narrow in (torch.bfloat16, torch.float16) and float32_is_faster():
        query, key, value = query.float(), key.float(), value.float()
    lengths = [end - start for start, end in pairwise(sample_starts)]
    outputs = []
    for q, k, v in zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True):
        n = q.shape[2]
        seen = None if attention_mask is None or n <= causal_rows else attention_mask[..., :n, :n]
        plain = seen is None and (attention_mask is not None or causal)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=plain, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1).to(narrow), None


def _check_called(layer: nn.Module, *_: Any) -> None:
    """Raises unless the layer's tokens were mixed by `_attention`."""
    if not [module for module in layer.modules() if module.__dict__.pop(_CALLED, False)]:
        raise Unpackable(f"a {type(layer).__name__} mixes tokens without transformers' attention interface")

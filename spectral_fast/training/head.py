"""A causal model's output embedding, watched during a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Head:
    """What enters and what leaves the output embedding of a causal language model of transformers, adapted or not.

    Hidden states are what the backbone gives, which costs nothing and needs no `output_hidden_states`. Logits are the
    model's, if it forms them; TRL's trainers do not, but take the loss from hidden states and the embedding's weight.

    Args:
        model: the model, or PEFT's around it.

    Attributes:
        d_hidden, vocab_size: columns and rows of the output embedding.
        hidden: (batch, tokens, d_hidden), of the last forward pass under `watch`; without a graph, as the next.
        logits: (batch, tokens, vocab_size), scaled and capped as the model does; None if it has not formed them.

    Raises:
        ValueError: the model has no output embedding, or nothing before it, or an encoder.
    """

    def __init__(self, model: Any) -> None:
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        head, self._backbone = self._model.get_output_embeddings(), self._model.base_model
        if head is None or self._backbone is self._model:
            raise ValueError(
                "a gate wants a causal language model, a backbone and an output embedding; "
                f"{type(self._model).__name__} has not both"
            )
        if getattr(self._model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"a gate wants a causal language model; {type(self._model).__name__} has an encoder, and labels that "
                "are not shifted"
            )
        self.d_hidden, self.vocab_size = int(head.in_features), int(head.out_features)
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sees the forward passes within; nothing is held afterwards."""
        hooks = (
            self._backbone.register_forward_hook(self._take_hidden),
            self._model.register_forward_hook(self._take_logits),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.hidden = self.logits = None

    def _take_hidden(self, _: Any, __: Any, output: Any) -> None:
        self.hidden = (output[0] if isinstance(output, tuple) else output.last_hidden_state).detach()

    def _take_logits(self, _: Any, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        self.logits = None if logits is None else logits.detach()

    def seen(self, whole: bool) -> tuple[Tensor, Tensor]:
        """Hidden states, and logits or what stands for them: the embedding's weight, if they are linear in it.

        Args:
            whole: logits are wanted in any case.
        """
        assert self.hidden is not None
        if self.logits is not None:
            return self.hidden, self.logits
        head, config = self._model.get_output_embeddings(), self._model.config.get_text_config()
        hidden = self.hidden.to(head.weight.device)
        scale, cap = _scale(config), getattr(config, "final_logit_softcapping", None)
        if head.weight.is_floating_point():
            hidden = hidden.to(head.weight.dtype)
            if head.bias is None and scale == 1 and cap is None and not whole:
                return hidden, head.weight.detach()
        with torch.no_grad():
            logits = head(hidden) * scale
            return hidden, logits if cap is None else cap * (logits / cap).tanh()


def _scale(config: Any) -> float:
    """What a model multiplies its logits by: the names that its configuration may have for it, as TRL reads them."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)

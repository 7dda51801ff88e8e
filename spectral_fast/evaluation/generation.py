"""Text from prompts by a transformers model: a decoding loop of our own, in batches that shrink.

Against `model.generate` it saves three things, which is most of the time of a small model on a CPU: the
key-value cache grows by doubling instead of by a copy per token, rows that have ended leave the batch, and
what all prompts begin with (the few-shot examples) goes through the model once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectral_fast.evaluation.cache import States, empty_cache, prefixed_cache

STOP_INTERVAL = 8  # tokens between looks for stop strings, each of which decodes the text so far
SHRINK_AT = 0.75  # drop ended rows once at most this share still runs: copying the cache pays by then


@dataclass(frozen=True)
class TransformersEngine:
    """A model and its tokenizer as an evaluation engine.

    Attributes:
        model: causal language model (or PeftModel) with full or sliding-window attention, in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: prompts that run together.
        max_model_len: most tokens of prompt and answer together; None leaves it to the model.
        progress: called with the number of prompts that have ended since the last call.
    """

    name: ClassVar[str] = "transformers"

    model: Any
    tokenizer: Any
    batch_size: int = 32
    max_model_len: int | None = None
    progress: Callable[[int], object] | None = None

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """See `generate`."""
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=max_tokens,
            batch_size=self.batch_size,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            max_model_len=self.max_model_len,
            progress=self.progress,
        )


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    max_model_len: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Continue every prompt until its end-of-sequence token, a stop string, or max_new_tokens.

    Args:
        model: causal language model with full or sliding-window attention, in evaluation mode.
        tokenizer: its tokenizer; prompts get its special tokens (a BOS, say), texts lose theirs.
        prompts: the prompts, of at least one token each.
        max_new_tokens: most tokens per continuation.
        batch_size: prompts that run together, longest first.
        temperature: 0 is greedy; else logits are divided by it and sampled.
        top_p: sample from the fewest tokens whose probabilities sum to at least this.
        seed: of the sampling; prompt i's draws depend on (seed, i, max_new_tokens) alone, not on the batches.
        stop: a text ends before the first occurrence of any of these.
        max_model_len: most tokens of prompt and continuation together, if less than the model's own limit.
        progress: called with the number of prompts that have ended since the last call.

    Returns:
        One continuation per prompt, in the order of the prompts.

    Raises:
        ValueError: a prompt is empty or leaves no room for max_new_tokens (nothing is ever truncated), an
            argument is out of range, or the model is in training mode.
    """
    _check(model, max_new_tokens, batch_size, temperature, top_p, stop)
    if not prompts:
        return []
    ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    _check_lengths(model, ids, max_new_tokens, max_model_len)
    draws = None
    if temperature > 0:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(len(ids), max_new_tokens, generator=generator)
    prefix = _common_prefix(ids)
    loop = _Loop(model, tokenizer, max_new_tokens, temperature, top_p, tuple(stop), progress)
    prefix_states = loop.run_prefix(prefix) if prefix else []
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    texts = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch_draws = None if draws is None else draws[chosen].to(model.device)
        batch_texts = loop.run([ids[i] for i in chosen], len(prefix), prefix_states, batch_draws)
        for i, text in zip(chosen, batch_texts, strict=True):
            texts[i] = text
    return texts


@dataclass(frozen=True)
class _Loop:
    """The decoding of one call of `generate`: what all its batches share."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    progress: Callable[[int], object] | None

    def run_prefix(self, prefix: Sequence[int]) -> list[States]:
        """Keys and values of every layer, (heads, length, head size), of what all prompts begin with."""
        cache = empty_cache()
        ids = torch.tensor([prefix], device=self.model.device)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def run(
        self,
        rows: Sequence[Sequence[int]],
        prefix_length: int,
        prefix_states: Sequence[States],
        draws: Tensor | None,
    ) -> list[str]:
        """The texts of one batch of prompts, padded on the left; masks come from lengths."""
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        width = int(lengths.max())
        padding = width - lengths
        mask = (torch.arange(width, device=device) >= padding[:, None]).long()
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, prefix_length:]
        padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
        feed = padded[:, prefix_length:]
        cache = prefixed_cache(prefix_length, prefix_states, padding) if prefix_length else empty_cache()

        eos = _end_tokens(self.model, self.tokenizer)
        tokens = torch.zeros(len(rows), self.max_new_tokens, dtype=torch.long, device=device)
        n_tokens = torch.full_like(lengths, self.max_new_tokens)  # of each text, the end token left out
        ended = torch.zeros_like(lengths, dtype=torch.bool)
        active = torch.arange(len(rows), device=device)  # the rows that are still in the cache
        for step in range(self.max_new_tokens):
            logits = self.model(
                input_ids=feed,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = self._choose(logits.float(), None if draws is None else draws[active, step])
            tokens[active, step] = chosen
            newly = torch.isin(chosen, eos) & ~ended[active]
            n_tokens[active[newly]] = step
            if self.stop and (step + 1) % STOP_INTERVAL == 0:
                going = active[~(newly | ended[active])]
                stopped = going[self._stopped(padded[going, -1], tokens[going, : step + 1])]
                n_tokens[stopped] = step + 1
                newly |= torch.isin(active, stopped)
            ended[active[newly]] = True
            running = ~ended[active]
            n_running = int(running.sum())
            self._report(int(newly.sum()))
            if n_running == 0:
                break
            feed, position = chosen[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(feed)], 1)
            if n_running <= SHRINK_AT * len(active):
                active, feed, position, mask = (x[running] for x in (active, feed, position, mask))
                for layer in cache.layers:
                    layer.keep_rows(running)
        self._report(int((~ended).sum()))
        kept = [row[:n] for row, n in zip(tokens.tolist(), n_tokens.tolist(), strict=True)]
        texts = _decode(self.tokenizer, padded[:, -1].tolist(), kept)
        return [text[: min([len(text), *(text.find(s) for s in self.stop if s in text)])] for text in texts]

    def _choose(self, logits: Tensor, draw: Tensor | None) -> Tensor:
        """The next token of each row: the likeliest, or the one at the draw's place among the likeliest."""
        if draw is None:
            return logits.argmax(-1)
        p, order = (logits / self.temperature).softmax(-1).sort(-1, descending=True)
        cumulated = p.cumsum(-1)
        kept = (cumulated - p < self.top_p).sum(-1, keepdim=True)  # the fewest whose sum reaches top_p
        target = draw.to(p.dtype)[:, None] * cumulated.gather(-1, kept - 1)
        place = torch.searchsorted(cumulated, target, right=True).minimum(kept - 1)
        return order.gather(-1, place)[:, 0]

    def _stopped(self, last: Tensor, tokens: Tensor) -> Tensor:
        """Which texts, of tokens (rows, length) after their prompt's last one, have come to a stop string."""
        texts = _decode(self.tokenizer, last.tolist(), tokens.tolist())
        found = [any(s in text for s in self.stop) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=tokens.device)

    def _report(self, n: int) -> None:
        if self.progress is not None and n:
            self.progress(n)


def _common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The tokens that all rows begin with, at least one token of each left out."""
    first, last = min(rows), max(rows)
    length = min(len(row) for row in rows) - 1
    return first[: next((i for i in range(length) if first[i] != last[i]), length)]


def _decode(tokenizer: Any, last: Sequence[int], tokens: Sequence[list[int]]) -> list[str]:
    """Tokens to text as they continue the prompt: after its last token, so that a leading space survives."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return [text([end, *new])[len(text([end])) :] for end, new in zip(last, tokens, strict=True)]


def _end_tokens(model: Any, tokenizer: Any) -> Tensor:
    configured = model.generation_config.eos_token_id
    ends = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    return torch.tensor([end for end in ends if end is not None], dtype=torch.long, device=model.device)


def _check(
    model: Any, max_new_tokens: int, batch_size: int, temperature: float, top_p: float, stop: Sequence[str]
) -> None:
    if model.training:
        raise ValueError("generation needs the model in evaluation mode, without dropout; call model.eval()")
    for name, count in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
    if not (0 <= temperature < float("inf")):
        raise ValueError(f"temperature must be 0 (greedy) or positive; got {temperature}")
    if not (0 < top_p <= 1):
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop must be a list of strings that are not empty; got {stop!r}")


def _check_lengths(model: Any, ids: Sequence[Sequence[int]], max_new_tokens: int, max_model_len: int | None) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min((n for n in (positions, max_model_len) if n is not None), default=None)
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(f"prompt {i} has no tokens")
        if limit is not None and len(row) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens, with {max_new_tokens} new ones more than {limit} (the model "
                f"has {positions} positions, max_model_len is {max_model_len}); nothing is truncated: ask for "
                "fewer new tokens or give fewer few-shot examples"
            )

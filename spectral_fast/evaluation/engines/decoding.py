"""Text from prompts by a transformers model: a decoding loop of our own, in batches that shrink.

Against `model.generate` it saves three things, which is most of the time of a small model on a CPU: the
key-value cache grows by doubling instead of by a copy per token, rows that have ended leave the batch, and
what all prompts begin with (the few-shot examples) goes through the model once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_fast.evaluation.engines.cache import States, empty_cache, prefixed_cache
from spectral_fast.evaluation.engines.protocol import Progress, Sampling
from spectral_fast.evaluation.engines.text import continuation, end_tokens, sample_seed, tokenise, until_stop

STOP_INTERVAL = 8  # tokens between looks for stop strings, each of which decodes the text so far
SHRINK_AT = 0.75  # drop ended rows once at most this share still runs: copying the cache pays by then


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> list[list[str]]:
    """Continue every prompt until its end-of-sequence token, a stop string, or max_tokens.

    Args:
        model: causal language model with full or sliding-window attention, in evaluation mode.
        tokenizer: its tokenizer; prompts get its special tokens (a BOS, say), texts lose theirs.
        prompts: the prompts, of at least one token each.
        sampling: how; the draws of sample j of a prompt depend on (seed, the prompt, j, max_tokens) alone.
        batch_size: texts that run together, those of the longest prompts first.
        max_model_len: most tokens of prompt and continuation together, if less than the model's own limit.
        progress: called with the number of texts that have ended since the last call.

    Returns:
        n continuations per prompt, in the order of the prompts.

    Raises:
        ValueError: a prompt is empty or leaves no room for max_tokens (nothing is ever truncated), the batch
            size is not positive, or the model is in training mode.
    """
    if model.training:
        raise ValueError("generation needs the model in evaluation mode, without dropout; call model.eval()")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if not prompts:
        return []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = tokenise(tokenizer, prompts, sampling.max_tokens, positions, max_model_len)
    greedy = sampling.temperature == 0
    runs = [(i, j) for i in range(len(ids)) for j in range(1 if greedy else sampling.n)]
    prefix = _common_prefix(ids)
    loop = _Loop(model, tokenizer, sampling, sampling.n if greedy else 1, progress)
    prefix_states = loop.run_prefix(prefix) if prefix else []
    runs.sort(key=lambda run: -len(ids[run[0]]))
    texts: list[list[str]] = [[""] * sampling.n for _ in ids]
    for start in range(0, len(runs), batch_size):
        chosen = runs[start : start + batch_size]
        draws = None if greedy else _draws([sample_seed(sampling.seed, ids[i], j) for i, j in chosen], sampling)
        batch_texts = loop.run([ids[i] for i, _ in chosen], len(prefix), prefix_states, draws)
        for (i, j), text in zip(chosen, batch_texts, strict=True):
            texts[i][j] = text
    if greedy:  # one decoding is all of them
        texts = [[text] * sampling.n for text, *_ in texts]
    return texts


@dataclass(frozen=True)
class _Loop:
    """The decoding of one call of `generate`: what all its batches share."""

    model: Any
    tokenizer: Any
    sampling: Sampling
    copies: int  # texts that each row stands for
    progress: Progress | None

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

        stop, max_tokens = self.sampling.stop, self.sampling.max_tokens
        ends = end_tokens(self.model.generation_config, self.tokenizer)
        eos = torch.tensor(ends, dtype=torch.long, device=device)
        draws = None if draws is None else draws.to(device)
        tokens = torch.zeros(len(rows), max_tokens, dtype=torch.long, device=device)
        n_tokens = torch.full_like(lengths, max_tokens)  # of each text, the end token left out
        ended = torch.zeros_like(lengths, dtype=torch.bool)
        active = torch.arange(len(rows), device=device)  # the rows that are still in the cache
        for step in range(max_tokens):
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
            if stop and (step + 1) % STOP_INTERVAL == 0:
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
        return [until_stop(text, stop) for text in self._texts(padded[:, -1].tolist(), kept)]

    def _choose(self, logits: Tensor, draw: Tensor | None) -> Tensor:
        """The next token of each row: the likeliest, or the one at the draw's place among the likeliest."""
        if draw is None:
            return logits.argmax(-1)
        p, order = (logits / self.sampling.temperature).softmax(-1).sort(-1, descending=True)
        cumulated = p.cumsum(-1)
        kept = (cumulated - p < self.sampling.top_p).sum(-1, keepdim=True)  # the fewest whose sum reaches top_p
        target = draw.to(p.dtype)[:, None] * cumulated.gather(-1, kept - 1)
        place = torch.searchsorted(cumulated, target, right=True).minimum(kept - 1)
        return order.gather(-1, place)[:, 0]

    def _stopped(self, last: Tensor, tokens: Tensor) -> Tensor:
        """Which texts, of tokens (rows, length) after their prompt's last one, have come to a stop string."""
        texts = self._texts(last.tolist(), tokens.tolist())
        found = [any(s in text for s in self.sampling.stop) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=tokens.device)

    def _texts(self, last: Sequence[int], tokens: Sequence[list[int]]) -> list[str]:
        return [continuation(self.tokenizer, end, new) for end, new in zip(last, tokens, strict=True)]

    def _report(self, n: int) -> None:
        if self.progress is not None and n:
            self.progress(n * self.copies)


def _common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The tokens that all rows begin with, at least one token of each left out."""
    first, last = min(rows), max(rows)
    length = min(len(row) for row in rows) - 1
    return first[: next((i for i in range(length) if first[i] != last[i]), length)]


def _draws(seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """Uniform numbers (texts, max_tokens), a row per seed."""
    generator = torch.Generator()
    return torch.stack([torch.rand(sampling.max_tokens, generator=generator.manual_seed(seed)) for seed in seeds])

"""Between text and tokens, the same for every engine: prompts in, continuations out, and where they end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


def tokenise(
    tokenizer: Any, prompts: Sequence[str], max_tokens: int, positions: int | None, max_model_len: int | None
) -> list[list[int]]:
    """Token ids of the prompts, with the tokenizer's special tokens (a BOS, say).

    Args:
        tokenizer: a transformers tokenizer.
        prompts: at least one.
        max_tokens: room that a continuation needs.
        positions: what the model has, if it says so.
        max_model_len: a lower limit of the user's.

    Raises:
        ValueError: a prompt has no tokens or leaves no room.
    """
    ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    limit = min((n for n in (positions, max_model_len) if n is not None), default=None)
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(f"prompt {i} has no tokens")
        if limit is not None and len(row) + max_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens, with {max_tokens} new ones more than {limit} (the model "
                f"has {positions} positions, max_model_len is {max_model_len}); nothing is truncated: ask for "
                "fewer new tokens or give fewer few-shot examples"
            )
    return ids


def continuation(tokenizer: Any, last: int, tokens: Sequence[int]) -> str:
    """Tokens to text as they continue the prompt: after its last token, so that a leading space survives."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return text([last, *tokens])[len(text([last])) :]


def until_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min([len(text), *(text.find(s) for s in stop if s in text)])]


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: those of the model's generation config and the tokenizer's own."""
    configured = generation_config.eos_token_id
    ends = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    return list(dict.fromkeys(end for end in ends if end is not None))


def sample_seed(seed: int, ids: Sequence[int], sample: int) -> int:
    """Seed of one sample of one prompt, in [0, 2^63)."""
    digest = hashlib.sha256(repr((seed, list(ids), sample)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

"""What an evaluation wants of an engine: texts for prompts, each by the adapter it is meant for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

Progress = Callable[[int], object]  # told how many more texts are done


@dataclass(frozen=True)
class Sampling:
    """How texts are decoded, the same in every engine.

    Attributes:
        max_tokens: most tokens of a text.
        temperature: 0 is greedy; else logits are divided by it and sampled.
        top_p: sample from the fewest tokens whose probabilities sum to at least this.
        seed: sample j of a prompt depends on (seed, the prompt, j), and neither on other prompts nor on batches.
        stop: a text ends before the first occurrence of any of these.
        n: texts per prompt.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    n: int = 1

    def __post_init__(self) -> None:
        for name, count in (("max_tokens", self.max_tokens), ("n", self.n)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1; got {count}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a list of strings that are not empty; got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))


class Engine(Protocol):
    """A base model that turns prompts into texts, with any number of adapters; a context manager, closed at the end."""

    @property
    def name(self) -> str:
        """What a result calls it."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its numbers depend on (dtype, device, batches, …), for the record of a result."""

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        adapters: Path | Sequence[Path | None] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[list[str]]:
        """Continue every prompt `sampling.n` times, to its end token, a stop string or max_tokens.

        Args:
            prompts: the prompts, of at least one token each; they get the tokenizer's special tokens.
            sampling: how.
            adapters: adapter folder for all prompts or one per prompt, None for the base model alone. A folder
                is read anew by every call.
            progress: called with the number of texts that have ended since the last call.

        Returns:
            n texts per prompt, in the order of the prompts.

        Raises:
            FileNotFoundError: an adapter is missing.
            ValueError: a prompt is empty or leaves no room for max_tokens (nothing is ever truncated), or an
                adapter does not fit the base model or cannot be served.
        """

    def close(self) -> None:
        """Give the memory back; may be called twice."""

    def __enter__(self) -> Engine:
        """The engine itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""


def one_per_prompt(adapters: Path | Sequence[Path | None] | None, prompts: Sequence[str]) -> list[Path | None]:
    """The adapter of each prompt.

    Raises:
        ValueError: there are more or fewer adapters than prompts.
    """
    if adapters is None or isinstance(adapters, Path):
        return [adapters] * len(prompts)
    if len(adapters) != len(prompts):
        raise ValueError(f"adapters must be one for all prompts or one per prompt: {len(adapters)} for {len(prompts)}")
    return list(adapters)

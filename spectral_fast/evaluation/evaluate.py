"""Tasks: prompts for an engine, files of what came out, and two such runs compared problem by problem."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from spectral_fast.atomic import replace_file
from spectral_fast.evaluation.comparison import compare, standard_error
from spectral_fast.evaluation.engines import Engine, Sampling
from spectral_fast.evaluation.gsm8k import AnswerParser, Problem, build_prompts, check_golds, score, stop_strings
from spectral_fast.evaluation.profiles import Profile

METRICS = "metrics_gsm8k.json"


class Task(Protocol):
    """Prompts, how they are decoded, and what becomes of the texts."""

    @property
    def prompts(self) -> Sequence[str]:
        """One per problem."""

    @property
    def sampling(self) -> Sampling:
        """How they are decoded."""

    def record(
        self,
        texts: Sequence[Sequence[str]],
        out_dir: Path | str,
        *,
        engine: Engine,
        variant: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Score the texts, write the files of the evaluation, and return the result.

        Args:
            texts: `sampling.n` per prompt.
            out_dir: existing or new folder for the files.
            engine: what made the texts; its name and settings become part of the record.
            variant: name of this run among others in the same folder; a suffix of the files' names.
            meta: what else the record shall say, e.g. base_model_id, lora_dir.
        """


@dataclass(frozen=True)
class Gsm8k:
    """Problems with a question and an answer, by exact match; see `Task`.

    Attributes:
        problems: rows with question and answer, see `load_problems`.
        shots: the few-shot examples.
        profile: decoding settings.
        answer_parser: one of `gsm8k.PARSERS`; "harness" and "exact" also stop as the harness does.
        stop: strings that end a generation.
        seed: of the sampling, if any.

    Raises:
        ValueError: no problems, an unknown parser, or a reference that has no answer for it, see `check_golds`.
    """

    problems: Sequence[Problem]
    shots: Sequence[Problem]
    profile: Profile
    answer_parser: AnswerParser = "strict_last"
    stop: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.problems:
            raise ValueError("there are no problems to evaluate on")
        stop_strings(self.answer_parser)  # refuses an unknown parser
        check_golds(self.problems, self.answer_parser)

    @property
    def prompts(self) -> list[str]:
        """The shots and the question, one prompt per problem."""
        return build_prompts(self.problems, self.shots)

    @property
    def sampling(self) -> Sampling:
        """Of the profile, with the parser's own stop strings."""
        stops = [*self.stop, *(s for s in stop_strings(self.answer_parser) if s not in self.stop)]
        return self.profile.sampling(seed=self.seed, stop=stops)

    def record(
        self,
        texts: Sequence[Sequence[str]],
        out_dir: Path | str,
        *,
        engine: Engine,
        variant: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Accuracy, with every prediction written down.

        Writes `gsm8k_predictions.jsonl` (idx, gold, pred, correct, generation) and `eval_config.json`; a
        variant, such as "baseline" or "edited", becomes a suffix of both names.

        Returns:
            {acc, correct, total, standard_error, engine, answer_parser, profile, config_path, predictions_path}.
        """
        rows = score(self.problems, [text for text, *_ in texts], self.answer_parser)
        correct, total = sum(row["correct"] for row in rows), len(rows)
        acc = correct / total
        counts = {"correct": correct, "total": total, "standard_error": standard_error(acc, total)}
        config = {
            "task": "gsm8k",
            "split": self.profile.split,
            "num_fewshot": len(self.shots),
            "decoding": decoding(self.sampling),
            "answer_parser": self.answer_parser,
            "engine": engine.name,
            "engine_settings": dict(engine.settings),
            "total_samples": total,
            "metric": {"name": "strict_match_accuracy", "score": acc, **counts},
            "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
            "meta": {"seed": self.seed, **(meta or {})},
        }
        suffix = "" if variant is None else f"_{variant}"
        config_path = Path(out_dir, f"eval_config{suffix}.json")
        predictions_path = Path(out_dir, f"gsm8k_predictions{suffix}.jsonl")
        write_rows(predictions_path, rows)
        write_json(config_path, config)
        return {
            "acc": acc,
            **counts,
            "engine": engine.name,
            "answer_parser": self.answer_parser,
            "profile": self.profile.summary() if self.profile.profile is not None else None,
            "config_path": str(config_path),
            "predictions_path": str(predictions_path),
        }


def decoding(sampling: Sampling) -> dict[str, Any]:
    """How texts were decoded, as `eval_config.json` has it."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "n_generations": sampling.n,
        "strategy": "greedy" if sampling.temperature == 0 else "sampling",
        "stop": list(sampling.stop),
    }


def write_metrics(
    baseline: Mapping[str, Any], edited: Mapping[str, Any], out_dir: Path | str, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare two results of `Gsm8k.record` on the same problems and write `metrics_gsm8k.json`.

    Returns:
        {results: {baseline, edited}, comparison, meta}, as written.

    Raises:
        ValueError: the two runs are not of the same problems.
    """
    comparison = compare(read_correct(baseline["predictions_path"]), read_correct(edited["predictions_path"]))
    metrics = {
        "results": {"baseline": dict(baseline), "edited": dict(edited)},
        "comparison": comparison.to_dict(),
        "meta": dict(meta),
    }
    write_json(Path(out_dir, METRICS), metrics)
    return metrics


def read_correct(predictions_path: Path | str) -> dict[tuple[int, str | None], bool]:
    """(idx, gold) -> correct, from a file of predictions; gold tells other problems with the same numbers apart.

    Example:
        >>> from pathlib import Path
        >>> from spectral_fast.evaluation import read_correct
        >>> _ = Path("predictions.jsonl").write_text('{"idx": 0, "gold": "5", "pred": "5", "correct": true}')
        >>> read_correct("predictions.jsonl")
        {(0, '5'): True}
    """
    with Path(predictions_path).open(encoding="utf-8") as file:
        return {(row["idx"], row["gold"]): row["correct"] for row in map(json.loads, file)}


def write_json(path: Path, content: Any) -> None:
    """A JSON file that appears whole or not at all, in a folder that is made if it is missing."""
    _write(path, [json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)])


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """A JSON object per line, written as `write_json` does."""
    _write(path, [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows])


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(f"{line}\n" for line in lines))

"""Run a task through an engine, write what came out, and compare two such runs problem by problem."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from spectral_fast.evaluation.comparison import compare, standard_error
from spectral_fast.evaluation.gsm8k import AnswerParser, Problem, build_prompts, score, stop_strings
from spectral_fast.evaluation.profiles import Profile

METRICS = "metrics_gsm8k.json"


class Engine(Protocol):
    """Whatever turns prompts into text."""

    @property
    def name(self) -> str:
        """What a result calls it."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
    ) -> list[str]:
        """One continuation per prompt, in order, ended before the first stop string."""


def evaluate_gsm8k(
    engine: Engine,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    profile: Profile,
    out_dir: Path | str,
    *,
    answer_parser: AnswerParser = "strict_last",
    stop: Sequence[str] = (),
    seed: int = 0,
    variant: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy on GSM8K problems, with every prediction written down.

    Writes `gsm8k_predictions.jsonl` (idx, gold, pred, correct, generation) and `eval_config.json`; a
    variant, such as "baseline" or "edited", becomes a suffix of both names.

    Args:
        engine: what generates.
        problems: rows with question and answer, see `load_problems`.
        shots: the few-shot examples.
        profile: decoding settings.
        out_dir: existing or new folder for the files.
        answer_parser: "strict_last", "strict_first" or "harness", which also stops as the harness does.
        stop: strings that end a generation.
        seed: of the sampling, if any.
        variant: name of this run among others in the same folder.
        meta: what else the record shall say, e.g. base_model_id, lora_dir, max_model_len.

    Raises:
        ValueError: there are no problems, the parser is unknown, or a prompt does not fit.

    Returns:
        {acc, correct, total, standard_error, engine, answer_parser, profile, config_path, predictions_path}.
    """
    if not problems:
        raise ValueError("there are no problems to evaluate on")
    stops = [*stop, *(s for s in stop_strings(answer_parser) if s not in stop)]
    texts = engine.generate(
        build_prompts(problems, shots),
        max_tokens=profile.max_tokens,
        temperature=profile.temperature,
        top_p=profile.top_p,
        seed=seed,
        stop=stops,
    )
    rows = score(problems, texts, answer_parser)
    correct, total = sum(row["correct"] for row in rows), len(rows)
    acc = correct / total
    counts = {"correct": correct, "total": total, "standard_error": standard_error(acc, total)}
    config = {
        "task": "gsm8k",
        "split": profile.split,
        "num_fewshot": len(shots),
        "decoding": {
            "temperature": profile.temperature,
            "top_p": profile.top_p,
            "max_tokens": profile.max_tokens,
            "strategy": profile.strategy,
            "stop": stops,
        },
        "answer_parser": answer_parser,
        "engine": engine.name,
        "total_samples": total,
        "metric": {"name": "strict_match_accuracy", "score": acc, **counts},
        "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
        "meta": {"seed": seed, **(meta or {})},
    }
    suffix = "" if variant is None else f"_{variant}"
    config_path = Path(out_dir, f"eval_config{suffix}.json")
    predictions_path = Path(out_dir, f"gsm8k_predictions{suffix}.jsonl")
    _write_lines(predictions_path, [json.dumps(row, ensure_ascii=False) for row in rows])
    _write_json(config_path, config)
    return {
        "acc": acc,
        **counts,
        "engine": engine.name,
        "answer_parser": answer_parser,
        "profile": profile.summary() if profile.profile is not None else None,
        "config_path": str(config_path),
        "predictions_path": str(predictions_path),
    }


def write_metrics(
    baseline: Mapping[str, Any], edited: Mapping[str, Any], out_dir: Path | str, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare two results of `evaluate_gsm8k` on the same problems and write `metrics_gsm8k.json`.

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
    _write_json(Path(out_dir, METRICS), metrics)
    return metrics


def read_correct(predictions_path: Path | str) -> dict[tuple[int, str | None], bool]:
    """(idx, gold) -> correct, from a file of predictions; gold tells other problems with the same numbers apart."""
    with Path(predictions_path).open(encoding="utf-8") as file:
        return {(row["idx"], row["gold"]): row["correct"] for row in map(json.loads, file)}


def _write_json(path: Path, content: Any) -> None:
    _write_lines(path, [json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)])


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write beside the file and rename, so that a reader sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

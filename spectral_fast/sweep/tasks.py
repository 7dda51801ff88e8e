"""The tasks of a sweep, and what is read back of their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectral_fast.evaluation.evaluate import Task
from spectral_fast.evaluation.humaneval import HumanEval


def check_sandbox(task: Task) -> None:
    """Find out before long work whether the programs that a task has run can be confined here.

    Raises:
        RuntimeError: they cannot.
    """
    if isinstance(task, HumanEval):
        task.check_sandbox()


def read_scores(task: str, folder: Path) -> dict[str, float]:
    """Problem -> 1 if it was solved, else 0; or pass@k of its programs."""
    return {name: answer["score"] for name, answer in read_answers(task, folder).items()}


def read_answers(task: str, folder: Path) -> Mapping[str, dict[str, Any]]:
    """Problem -> {"score", "text"}, from the files of an evaluation; the text is the first of several."""
    if task == "gsm8k":
        rows = _rows(folder / "gsm8k_predictions.jsonl")
        return {str(row["idx"]): {"score": int(row["correct"]), "text": row["generation"]} for row in rows}
    problems = json.loads((folder / "per_problem_lora.json").read_text(encoding="utf-8"))
    texts = {row["task_id"]: row["completion"] for row in reversed(_rows(folder / "raw_generations_lora.jsonl"))}
    return {
        name: {"score": next(value for key, value in problem.items() if key.startswith("pass@")), "text": texts[name]}
        for name, problem in problems.items()
    }


def _rows(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]

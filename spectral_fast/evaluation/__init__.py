"""Evaluation: tasks are pure (prompts, scoring), engines turn prompts into text, comparison is paired."""

from spectral_fast.evaluation.adapters import evaluate_adapters
from spectral_fast.evaluation.comparison import compare
from spectral_fast.evaluation.engines import EngineOptions
from spectral_fast.evaluation.evaluate import read_correct
from spectral_fast.evaluation.humaneval import HumanEvalOptions
from spectral_fast.evaluation.lm_eval import run_lm_eval
from spectral_fast.evaluation.profiles import EvaluationOptions

__all__ = [
    "EngineOptions",
    "EvaluationOptions",
    "HumanEvalOptions",
    "compare",
    "evaluate_adapters",
    "read_correct",
    "run_lm_eval",
]

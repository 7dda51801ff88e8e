"""Evaluation: tasks are pure (prompts, scoring), engines turn prompts into text, comparison is paired."""

from typing import TYPE_CHECKING

from spectral_fast.lazy import lazily

if TYPE_CHECKING:
    from spectral_fast.evaluation.adapters import evaluate_adapters as evaluate_adapters
    from spectral_fast.evaluation.comparison import compare as compare
    from spectral_fast.evaluation.engines.options import EngineOptions as EngineOptions
    from spectral_fast.evaluation.evaluate import read_correct as read_correct
    from spectral_fast.evaluation.lm_eval import run_lm_eval as run_lm_eval
    from spectral_fast.evaluation.profiles import EvaluationOptions as EvaluationOptions
    from spectral_fast.evaluation.profiles import HumanEvalOptions as HumanEvalOptions
else:
    __getattr__, __dir__, __all__ = lazily(
        __name__,
        {
            "spectral_fast.evaluation.adapters": ("evaluate_adapters",),
            "spectral_fast.evaluation.comparison": ("compare",),
            "spectral_fast.evaluation.engines.options": ("EngineOptions",),
            "spectral_fast.evaluation.evaluate": ("read_correct",),
            "spectral_fast.evaluation.lm_eval": ("run_lm_eval",),
            "spectral_fast.evaluation.profiles": ("EvaluationOptions", "HumanEvalOptions"),
        },
    )

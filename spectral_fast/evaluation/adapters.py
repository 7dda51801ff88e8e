"""Evaluate adapters on one base model, in one engine, on the same problems with the same decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.evaluation.engines import Engine, EngineOptions, open_engine
from spectral_fast.evaluation.evaluate import Gsm8k, Task
from spectral_fast.evaluation.profiles import EvaluationOptions
from spectral_fast.progress import Counter
from spectral_fast.provenance import versions


@dataclass(frozen=True)
class Run:
    """One evaluation of a task.

    Attributes:
        adapter: folder of the adapter; None for the base model alone.
        out_dir: where its files go.
        variant: its name among others in the same folder, a suffix of the files' names.
        meta: what else its record shall say.
    """

    adapter: Path | None
    out_dir: Path
    variant: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def evaluate(
    engine: Engine, task: Task, runs: Sequence[Run], *, progress: Counter = lambda *_: nullcontext()
) -> list[dict[str, Any]]:
    """Run a task with several adapters in one call of the engine, so that vLLM batches them together.

    Args:
        engine: what generates.
        task: prompts and scoring.
        runs: one per adapter.
        progress: called with a description and the number of texts; a context manager that gives a function to
            be told how many more are done.

    Returns:
        One result of `task.record` per run.

    Raises:
        FileNotFoundError, ValueError: as `Engine.generate`.
    """
    prompts, n = task.prompts, len(task.prompts)
    hashes = [None if run.adapter is None else Adapter.open(run.adapter, splines=True).hashes for run in runs]
    with progress("evaluate", len(runs) * n * task.sampling.n) as advance:
        texts = engine.generate(
            [prompt for _ in runs for prompt in prompts],
            task.sampling,
            [run.adapter for run in runs for _ in prompts],
            progress=advance,
        )
    results = []
    for i, (run, sha256) in enumerate(zip(runs, hashes, strict=True)):
        meta = {
            "lora_dir": None if run.adapter is None else str(run.adapter),
            "adapter_files_sha256": sha256,
            "versions": versions(),
            **run.meta,
        }
        mine = texts[i * n : (i + 1) * n]
        results.append(task.record(mine, run.out_dir, engine=engine, variant=run.variant, meta=meta))
    return results


def evaluate_adapters(
    base_model: str,
    adapters: Mapping[str | None, Path | None],
    out_dir: Path,
    model_options: ModelOptions,
    options: EvaluationOptions,
    engine_options: EngineOptions,
    *,
    profile: str | None = None,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
    progress: Counter = lambda *_: nullcontext(),
) -> dict[str | None, dict[str, Any]]:
    """Exact match on GSM8K-style problems for each adapter.

    Args:
        base_model: folder or hub name.
        adapters: variant -> adapter folder, or None for the base model alone. The variant becomes part of the file
            names; that of a single one may be None.
        out_dir: folder for predictions and settings, see `Gsm8k.record`.
        model_options: device, dtype and source of the base model.
        options: problems and decoding.
        engine_options: what generates.
        profile: name of a profile whose few-shot examples and decoding replace those of `options`.
        seed: of the sampling, if any.
        meta: what else the records shall say.
        progress: see `evaluate`.

    Returns:
        variant -> result of `Gsm8k.record`.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as `load_problems`, `open_engine` and `Engine.generate`.
    """
    problems, shots = options.load(profile)
    task = Gsm8k(
        problems,
        shots,
        options.profile(profile),
        answer_parser=options.answer_parser,  # type: ignore[arg-type]
        stop=options.stop,
        seed=seed,
    )
    about = {
        "base_model_id": base_model,
        "max_model_len": engine_options.max_model_len,
        "eval_data": options.eval_data,
        "profile": profile,
        **(meta or {}),
    }
    runs = [Run(adapter, out_dir, variant, about) for variant, adapter in adapters.items()]
    with open_engine(base_model, model_options, engine_options, adapters.values()) as engine:
        results = evaluate(engine, task, runs, progress=progress)
    return dict(zip(adapters, results, strict=True))

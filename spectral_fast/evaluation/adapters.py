"""Evaluate adapters on one base model, in one engine, on the same problems with the same decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.evaluation.engines import Engine, EngineOptions, open_engine
from spectral_fast.evaluation.evaluate import Gsm8k, Task
from spectral_fast.evaluation.humaneval import HumanEval
from spectral_fast.evaluation.profiles import PROFILES, EvaluationOptions, HumanEvalOptions
from spectral_fast.progress import Counter
from spectral_fast.provenance import versions

Variant = TypeVar("Variant", bound=str | None)


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


def make_task(options: EvaluationOptions | HumanEvalOptions, profile: str | None = None, seed: int = 0) -> Task:
    """The task that options describe.

    Args:
        options: problems and decoding: questions with answers, or programs to write.
        profile: name of a profile whose few-shot examples and decoding replace those of `options`.
        seed: of the sampling, if any.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: its problems cannot be had.
    """
    if isinstance(options, HumanEvalOptions):
        return HumanEval.of(options, profile, seed)
    problems, shots = options.load(profile)
    parser: Any = options.answer_parser
    return Gsm8k(problems, shots, options.profile(profile), answer_parser=parser, stop=options.stop, seed=seed)


def evaluate_adapters(
    base_model: Path | str,
    adapters: Mapping[Variant, Path | str | None],
    out_dir: Path | str,
    model_options: ModelOptions | None = None,
    options: EvaluationOptions | HumanEvalOptions | None = None,
    engine_options: EngineOptions | None = None,
    *,
    profile: str | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
    meta: Mapping[str, Any] | None = None,
    progress: Counter = lambda *_: nullcontext(),
) -> dict[Variant, dict[str, Any]]:
    """Exact match on problems with answers, or pass@k of programs, of each adapter; all in one engine.

    Every prediction is written to `out_dir`, see `Gsm8k.record` and `HumanEval.record`.

    Args:
        base_model: folder or hub name.
        adapters: variant -> adapter folder, or None for the base model alone; the variant becomes part of the file
            names, None of a single one is none.
        out_dir: folder for predictions and settings.
        model_options: device, dtype and source of the base model.
        options: problems and decoding, by default GSM8K's test split with five worked examples; `HumanEvalOptions` for
            programs.
        engine_options: what generates.
        profile: name of a profile whose few-shot examples and decoding replace those of `options`.
        seed: of the sampling, if any.
        allow_code_execution: run what the model has written, in the sandbox; needed for programs.
        meta: what else the records shall say.
        progress: see `evaluate`.

    Returns:
        variant -> result of the task's `record`: acc, correct, total, standard_error and more; or pass@k.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as `make_task`, `open_engine` and `Engine.generate`; or programs
            are to be run, and `allow_code_execution` is not given, or nothing here confines them.

    Example:
        >>> from spectral_fast import embedded, evaluate_adapters
        >>> from spectral_fast.evaluation import EngineOptions, EvaluationOptions
        >>> adapters = {"base": None, "adapter": embedded.adapter_dir()}
        >>> task = EvaluationOptions(eval_data=str(embedded.heldout_file()), fewshot=0, max_samples=4, max_tokens=40)
        >>> engine = EngineOptions(engine="transformers")
        >>> base = embedded.base_model_dir()
        >>> results = evaluate_adapters(base, adapters, "results", options=task, engine_options=engine)
        >>> results["adapter"]["total"], results["adapter"]["predictions_path"]
        (4, 'results/gsm8k_predictions_adapter.jsonl')
    """
    if options is None:
        of_programs = profile is not None and PROFILES[profile].task == "humaneval"
        options = HumanEvalOptions() if of_programs else EvaluationOptions()
    if isinstance(options, HumanEvalOptions) and not allow_code_execution:
        raise ValueError(
            "HumanEval runs programs that a model has written, which may be harmful. They run confined (see "
            "spectral_fast/evaluation/sandbox); say allow_code_execution to allow it"
        )
    task = make_task(options, profile, seed)
    if isinstance(task, HumanEval):
        task.check_sandbox()  # before long work
    engine_options = engine_options or EngineOptions()
    about = {
        "base_model_id": str(base_model),
        "max_model_len": engine_options.max_model_len,
        "eval_data": options.eval_data,
        "profile": profile,
        **(meta or {}),
    }
    folders = {variant: None if adapter is None else Path(adapter) for variant, adapter in adapters.items()}
    runs = [Run(adapter, Path(out_dir), variant, about) for variant, adapter in folders.items()]
    with open_engine(str(base_model), model_options or ModelOptions(), engine_options, folders.values()) as engine:
        results = evaluate(engine, task, runs, progress=progress)
    return dict(zip(folders, results, strict=True))

"""Evaluate adapters on one base model, one after another, on the same problems with the same decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from spectral_fast.adapter import Adapter, changes_base
from spectral_fast.calibration.model import ModelOptions, check_fit, load_model, load_tokenizer
from spectral_fast.evaluation.evaluate import evaluate_gsm8k
from spectral_fast.evaluation.generation import TransformersEngine
from spectral_fast.evaluation.profiles import EvaluationOptions
from spectral_fast.provenance import versions

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object] | None]]


def evaluate_adapters(
    base_model: str,
    adapters: Mapping[str | None, Path],
    out_dir: Path,
    model_options: ModelOptions,
    options: EvaluationOptions,
    *,
    profile: str | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: nullcontext(),
) -> dict[str | None, dict[str, Any]]:
    """Exact match on GSM8K-style problems for each adapter, by transformers' models.

    Args:
        base_model: folder or hub name.
        adapters: variant -> adapter folder; the variant becomes part of the file names, None of a single one is none.
        out_dir: folder for predictions and settings, see `evaluate_gsm8k`.
        model_options: device, dtype and source of the base model.
        options: problems and decoding.
        profile: name of a profile whose few-shot examples and decoding replace those of `options`.
        seed: of the sampling, if any.
        progress: called with the variant and the number of problems; a context manager that gives a function to be
            told how many more are done.

    Returns:
        variant -> result of `evaluate_gsm8k`.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as `load_problems`, `load_model` and `generate`.
    """
    settings = options.profile(profile)
    problems, shots = options.load(profile)
    tokenizer = load_tokenizer(base_model, model_options)
    results = {}
    for variant, adapter, model in _each_on(base_model, model_options, adapters):
        with progress(variant or "evaluate", len(problems)) as advance:
            engine = TransformersEngine(model, tokenizer, options.batch_size, options.max_model_len, advance)
            meta = {
                "base_model_id": base_model,
                "lora_dir": str(adapter.path),
                "max_model_len": options.max_model_len,
                "eval_data": options.eval_data,
                "profile": profile,
                "batch_size": options.batch_size,
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": str(model.device),
                "adapter_files_sha256": adapter.hashes,
                "versions": versions(),
            }
            results[variant] = evaluate_gsm8k(
                engine,
                problems,
                shots,
                settings,
                out_dir,
                answer_parser=options.answer_parser,  # type: ignore[arg-type]
                stop=options.stop,
                seed=seed,
                variant=variant,
                meta=meta,
            )
    return results


def _each_on(
    base_model: str, options: ModelOptions, adapters: Mapping[str | None, Path]
) -> Iterator[tuple[str | None, Adapter, Any]]:
    """(variant, adapter, model with that adapter alone active); an adapter leaves memory before the next comes."""
    from peft import PeftModel

    model = None
    for variant, folder in adapters.items():
        adapter = Adapter.open(folder)
        model = model or load_model(base_model, options)
        device = model.device
        check_fit(model, adapter.modules.values(), base_model, folder)
        with_adapter = PeftModel.from_pretrained(model, str(folder)).to(device).eval()
        yield variant, adapter, with_adapter
        model = None if changes_base(adapter.config) else with_adapter.unload()

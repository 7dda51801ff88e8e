"""From names of a base model, an adapter and a data set to the adapter's sensitivities."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.backends import chosen_backends
from spectral_fast.calibration.calibrate import Engines, Progress, calibrate, in_memory
from spectral_fast.calibration.data import Example, encode_messages, encode_question_answer
from spectral_fast.calibration.model import load_model, load_tokenizer
from spectral_fast.calibration.options import CalibrationOptions, ModelOptions
from spectral_fast.calibration.ranks import Ranks
from spectral_fast.calibration.rows import GSM8K, data_file, read_rows
from spectral_fast.calibration.streaming.options import StreamOptions
from spectral_fast.calibration.streaming.skeleton import load_skeleton
from spectral_fast.calibration.streaming.stream import streamed
from spectral_fast.calibration.streaming.weights import Weights
from spectral_fast.calibration.streaming.work_folder import work_folder
from spectral_fast.provenance import sha256_file, versions
from spectral_fast.sensitivity import Sensitivity
from spectral_fast.statistics import Stability

SPLIT = "train"


def load_examples(tokenizer: Any, options: CalibrationOptions) -> list[Example]:
    """Read and tokenise the calibration samples.

    Raises:
        FileNotFoundError, RuntimeError: if the file is missing, or the hub cannot be reached.
        ValueError: for a row without the wanted columns or that cannot be tokenised, naming the row.
    """
    columns: Sequence[str] = [options.messages_column or options.question_column]
    if options.messages_column is None:
        columns = [*columns, options.answer_column]
    rows = read_rows(options.calib_data, columns, split=SPLIT, limit=options.limit)
    examples = []
    for index, row in enumerate(rows):
        try:
            if options.messages_column is not None:
                examples.append(encode_messages(tokenizer, row[options.messages_column]))
            else:
                question, answer = (str(row[column]) for column in columns)
                examples.append(encode_question_answer(tokenizer, question, answer))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{options.calib_data}, row {index}: {error}") from error
    return examples


def probe(
    adapter: Adapter,
    modules: Sequence[LoraModule],
    base_model: Path | str,
    data: CalibrationOptions | None = None,
    options: ModelOptions | None = None,
    progress: Progress = iter,
    ranks: Ranks | None = None,
    stream: StreamOptions | None = None,
    work_dir: Path | None = None,
) -> Sensitivity:
    """Measure the sensitivity of an adapter's singular values on calibration data, with the record of how.

    Args:
        adapter: the adapter, opened.
        modules: which of its modules to probe, e.g. `adapter.select(("down_proj", "o_proj"))`.
        base_model: folder or hub name of the base model.
        data: calibration samples; by default the first 32 of GSM8K's train split.
        options: device, dtype and source of the base model.
        progress: wraps the list of batches.
        ranks: the processes that share the samples; all of them get the same result.
        stream: whether to have the base model in memory as a whole (the default) or one layer at a time.
        work_dir: folder for the files of a streamed run, see `work_folder`; the caller discards it when the result is
            safe. By default a temporary one, with which a run cannot be resumed.

    Returns:
        s and g (float64) of shape (r,) per module, with g of each sample, (samples, r) float32, and a record of
        adapter, data, model, versions and of how certain the choice of directions is.

    Raises:
        FileNotFoundError, ValueError: as `load_model`, `load_examples` and `calibrate`.

    Source: Tian et al., "Spectral Surgery", arXiv:2603.03995. Cost: a forward and a backward pass per sample.

    Example:
        >>> from spectral_fast import Adapter, CalibrationOptions, embedded, probe
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> data = CalibrationOptions(calib_data=str(embedded.calibration_file()), calib_samples=4)
        >>> sensitivity = probe(adapter, adapter.select(("o_proj",)), embedded.base_model_dir(), data)
        >>> sensitivity.record["samples_used"], len(sensitivity.modules)
        (4, 4)
        >>> next(iter(sensitivity.modules.values())).samples.shape  # g of each sample
        torch.Size([4, 32])
        >>> sensitivity.save("probed")  # what `spectral-fast probe` leaves, and `edit --sensitivity` takes
    """
    data, options, ranks = data or CalibrationOptions(), options or ModelOptions(), ranks or Ranks()
    base_model = str(base_model)
    stream = stream or StreamOptions()
    if stream.stream and data.until_stable:
        raise ValueError(
            f"--until_stable {data.until_stable:g} takes samples in rounds, but --stream takes all of them through a "
            "layer before the next; leave out one of the two"
        )
    tokenizer = load_tokenizer(base_model, options)
    examples = load_examples(tokenizer, data)
    names = [module.name for module in modules]
    run = {
        "the adapter": adapter.fingerprint(),
        "the list of modules": names,
        "calib_samples": len(examples),
        "the tokens of the samples": _hash(examples),
        "calib_batch_size": data.calib_batch_size,
        "the number of ranks": ranks.size,
        "the rank": ranks.rank,
        **{f"the version of {name}": version for name, version in versions().items()},
    }
    with _opened(base_model, adapter, options, stream, run, work_dir) as (model, device, engines, weights):
        measured = calibrate(
            model,
            "default",
            examples,
            modules=names,
            batch_size=data.calib_batch_size,
            until_stable=data.until_stable,
            progress=progress,
            ranks=ranks,
            engines=engines,
        )
    examples = examples[: measured.record["samples_used"]]
    record = {
        "adapter_stamp": adapter.stamp(),
        "adapter_sha256": adapter.fingerprint(),
        "adapter_files_sha256": adapter.hashes,
        "lora_path": str(adapter.path),
        "base_model": base_model,
        "base_model_revision": getattr(model.config, "_commit_hash", None),
        **asdict(data),
        "calib_samples": data.limit,
        "calib_data_sha256": None if data.calib_data == GSM8K else sha256_file(data_file(data.calib_data, SPLIT)),
        "calib_tokens_sha256": _hash(examples),
        **measured.record,
        "tokens": sum(len(example.ids) for example in examples),
        "labels": sum(example.n_labels for example in examples),
        "dtype": str(next(model.get_base_model().parameters()).dtype).removeprefix("torch."),
        "device": str(device),
        "device_map": options.device_map,
        "load_in_4bit": options.load_in_4bit,
        "stream": stream.stream,
        "weights_read": None if weights is None else weights.bytes_read,
        "ranks": ranks.size,
        "stability": None if measured.samples is None else Stability.of(measured.samples).summary(),
        "backends": chosen_backends(),
        "versions": versions(),
    }
    return Sensitivity(measured.modules, record)


@contextmanager
def _opened(
    base_model: str,
    adapter: Adapter,
    options: ModelOptions,
    stream: StreamOptions,
    run: Mapping[str, Any],
    work_dir: Path | None,
) -> Iterator[tuple[Any, torch.device, Engines, Weights | None]]:
    """The model with its adapter, where it computes, what runs it, and what fills in its weights if it is streamed."""
    if not stream.stream:
        model = load_model(base_model, options, adapter)
        yield model, next(model.parameters()).device, in_memory, None
        return
    if stream.resume and work_dir is None:
        raise ValueError("a run that is to be resumed needs a work_dir, where the files of the killed one are")
    model, weights = load_skeleton(base_model, options, adapter)
    files = weights.files
    run = {
        **run,
        "the base model's files": _hash([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]),
        "the base model's config": _hash(json.loads(model.config.to_json_string(), object_pairs_hook=_without_dtype)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": weights.device.type,
    }
    with work_folder(work_dir, run, resume=stream.resume) as folder:
        budget = stream.budget(weights.device)
        yield model, weights.device, partial(streamed, weights=weights, folder=folder, budget=budget), weights


def _without_dtype(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key != "dtype"}


def _hash(value: Any) -> str:
    return sha256(repr(value).encode()).hexdigest()

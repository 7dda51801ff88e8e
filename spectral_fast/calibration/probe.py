"""From names of a base model, an adapter and a data set to the adapter's sensitivities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.backends import chosen_backends
from spectral_fast.calibration.calibrate import Progress, calibrate
from spectral_fast.calibration.data import Example, encode_messages, encode_question_answer
from spectral_fast.calibration.model import ModelOptions, load_model, load_tokenizer
from spectral_fast.calibration.ranks import Ranks
from spectral_fast.calibration.rows import GSM8K, data_file, read_rows
from spectral_fast.options import check, option
from spectral_fast.provenance import sha256_file, versions
from spectral_fast.sensitivity import Sensitivity

SPLIT = "train"


@dataclass(frozen=True)
class CalibrationOptions:
    """Which samples to calibrate on."""

    calib_data: str = option("gsm8k", "gsm8k (the train split, by datasets) or a .jsonl or .parquet file")
    calib_samples: int = option(32, "samples to take, from the first on", low=1)
    calib_batch_size: int = option(2, "samples per nominal batch, whose mean loss is differentiated", low=1)
    question_column: str = option("question", "column with the question")
    answer_column: str = option("answer", "column with the answer, whose tokens are the labels")
    messages_column: str | None = option(None, "column with chat messages; replaces question and answer")

    def __post_init__(self) -> None:
        check(self)


def load_examples(tokenizer: Any, options: CalibrationOptions) -> list[Example]:
    """Read and tokenise the calibration samples.

    Raises:
        FileNotFoundError, RuntimeError: if the file is missing, or the hub cannot be reached.
        ValueError: for a row without the wanted columns or that cannot be tokenised, naming the row.
    """
    columns: Sequence[str] = [options.messages_column or options.question_column]
    if options.messages_column is None:
        columns = [*columns, options.answer_column]
    rows = read_rows(options.calib_data, columns, split=SPLIT, limit=options.calib_samples)
    examples = []
    for index, row in enumerate(rows):
        try:
            if options.messages_column is not None:
                examples.append(encode_messages(tokenizer, row[options.messages_column]))
            else:
                question, answer = (str(row[column]) for column in columns)
                examples.append(encode_question_answer(tokenizer, question, answer))
        except ValueError as error:
            raise ValueError(f"{options.calib_data}, row {index}: {error}") from error
    return examples


def probe(
    adapter: Adapter,
    modules: Sequence[LoraModule],
    base_model: str,
    data: CalibrationOptions | None = None,
    options: ModelOptions | None = None,
    progress: Progress = iter,
    ranks: Ranks | None = None,
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

    Raises:
        FileNotFoundError, ValueError: as `load_model`, `load_examples` and `calibrate`.
    """
    data, options, ranks = data or CalibrationOptions(), options or ModelOptions(), ranks or Ranks()
    tokenizer = load_tokenizer(base_model, options)
    examples = load_examples(tokenizer, data)
    model = load_model(base_model, options, adapter)
    measured = calibrate(
        model,
        examples,
        modules=[module.name for module in modules],
        batch_size=data.calib_batch_size,
        progress=progress,
        ranks=ranks,
    )
    record = {
        "adapter_stamp": adapter.stamp(),
        "adapter_sha256": adapter.fingerprint(),
        "adapter_files_sha256": adapter.hashes,
        "lora_path": str(adapter.path),
        "base_model": base_model,
        "base_model_revision": getattr(model.config, "_commit_hash", None),
        **asdict(data),
        "calib_data_sha256": None if data.calib_data == GSM8K else sha256_file(data_file(data.calib_data, SPLIT)),
        "calib_tokens_sha256": sha256(repr(examples).encode()).hexdigest(),
        "samples_used": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
        "labels": sum(example.n_labels for example in examples),
        "dtype": str(next(model.get_base_model().parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "ranks": ranks.size,
        "backends": chosen_backends(),
        "versions": versions(),
    }
    return Sensitivity(measured.modules, record)

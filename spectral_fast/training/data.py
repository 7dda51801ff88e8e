"""Data sets to train on, in the forms that TRL's trainer takes: text, prompt and completion, or messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectral_fast.calibration.data import prompt_and_completion
from spectral_fast.calibration.rows import GSM8K, data_file
from spectral_fast.training.options import DataArguments

_READERS = {".jsonl": "json", ".parquet": "parquet"}


def load_split(
    source: str, split: str, limit: int | None, options: DataArguments, text_field: str, cache_dir: str | None
) -> Any:
    """A `datasets.Dataset` in one of TRL's forms.

    The form follows from the columns, in this order: `messages`; `prompt` and `completion`; the text field; question
    and answer, which become the prompt "Question: {q}", newline, "Answer:" and its completion, as in calibration (but
    after the tokenizer's beginning-of-sequence token, where it has one). Labels are the completion, or all of a text
    and of messages. Prompts and completions may be messages, too; a column `tools` goes with messages.

    Args:
        source: a .parquet or .jsonl file, a folder with {split}.parquet or {split}.jsonl, "gsm8k", or a hub name.
        split: of a folder, or of a data set of the hub.
        limit: rows to take, from the first on; None is all.
        options: the names of columns, and the configuration of a data set of the hub.
        text_field: the column with the text.
        cache_dir: where data sets are cached; None is datasets' own folder.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it is to be had from the hub only, which cannot be reached.
        ValueError: it is broken or empty, its columns are none of these forms, or a row lacks one of them or has
            something else there.
    """
    data = _load(source, split, options.dataset_config, cache_dir)
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    if not len(data):
        raise ValueError(f"{source} ({split}) has no rows to train on")
    question_answer = (options.question_column, options.answer_column)
    forms = (("messages",), ("prompt", "completion"), (text_field,), question_answer)
    columns = next((form for form in forms if set(form) <= set(data.column_names)), None)
    if columns is None:
        wanted = "; ".join(" and ".join(form) for form in forms)
        raise ValueError(f"{source} ({split}) has columns {', '.join(data.column_names)}; want {wanted}")
    kinds = {"messages": (list,), "prompt": (str, list), "completion": (str, list), text_field: (str,)}
    for column in columns:
        kind = object if columns == question_answer else kinds[column]
        for i, value in enumerate(data[column]):
            if value is None:
                raise ValueError(f"{source} ({split}), row {i} has no {column}")
            if not isinstance(value, kind):
                wanted = "a list of messages" if column == "messages" else "text"
                raise ValueError(f"{source} ({split}), row {i}: {column} must be {wanted}; got {value!r:.60}")
    tools = {"tools"} & set(data.column_names) if columns in forms[:2] else set()
    data = data.select_columns([*columns, *tools])
    if columns != question_answer:
        return data
    return data.map(_prompted, fn_kwargs={"columns": columns}, remove_columns=columns)


def _prompted(row: dict[str, Any], columns: tuple[str, str]) -> dict[str, str]:
    question, answer = (str(row[column]) for column in columns)
    prompt, completion = prompt_and_completion(question, answer)
    return {"prompt": prompt, "completion": completion}


def _load(source: str, split: str, config: str | None, cache_dir: str | None) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = Path(source)
    if path.exists() or path.suffix in _READERS:
        file = data_file(source, split)
        try:
            return load_dataset(_READERS[file.suffix], data_files=str(file), split="train", cache_dir=cache_dir)
        except (DatasetGenerationError, StopIteration, ValueError) as error:  # the latter two where it is empty
            why = str(error.__cause__ or error) or "it is empty"
            raise ValueError(f"{file} cannot be read as {file.suffix}: {why}") from error
    name, config = ("openai/gsm8k", "main") if source == GSM8K else (source, config)
    try:
        return load_dataset(name, config, split=split, cache_dir=cache_dir)
    except (ConnectionError, FileNotFoundError) as error:
        raise RuntimeError(
            f"{source} is neither a file or folder here nor to be had from the Hugging Face hub: "
            f"{str(error).splitlines()[0]}"
        ) from error

"""Sentences with classes, from GLUE's SST-2 or from files, for training a classifier."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spectral_fast.calibration.rows import Row, data_file, read_rows
from spectral_fast.study.options import PruneFinetuneOptions

SST2 = "glue/sst2"
HELD_OUT = 5  # of a single file, one row in so many is for evaluation


class Sentence(NamedTuple):
    """A text and its class, a number or a string."""

    text: str
    label: Any


def load_sentences(dataset: str, options: PruneFinetuneOptions) -> tuple[list[Sentence], list[Sentence], list[Any]]:
    """Sentences to train on and to evaluate on, drawn with the seed, and the classes in order.

    Args:
        dataset: "glue/sst2"; a folder with train and validation (or test) as .jsonl or .parquet; or one such file, of
            which a fifth is drawn for evaluation.
        options: numbers of sentences, columns and seed.

    Raises:
        FileNotFoundError: there are no such files.
        RuntimeError: glue/sst2 is not on this machine, and the hub cannot be reached.
        ValueError: rows without the columns, a class that is no number, string or truth value, one class only, or
            classes in the evaluation that training has not.
    """
    columns = (options.text_column, options.label_column)
    if dataset == SST2:
        whole, held_out = _sst2(columns)
    elif Path(dataset).is_dir():
        whole = read_rows(dataset, columns, "train")
        held_out = read_rows(str(_evaluation_file(dataset)), columns, "validation")
    else:
        rows = read_rows(dataset, columns, "train")
        if len(rows) < 2:
            raise ValueError(f"{dataset} has one row; training and evaluation need one each")
        drawn = set(random.Random(options.seed).sample(range(len(rows)), max(1, len(rows) // HELD_OUT)))
        whole = [row for i, row in enumerate(rows) if i not in drawn]
        held_out = [row for i, row in enumerate(rows) if i in drawn]
    for row in (*whole, *held_out):
        if not isinstance(row[options.label_column], str | int | float):
            raise ValueError(f"{dataset}: {options.label_column} must be a class; got {row[options.label_column]!r}")
    classes = sorted({row[options.label_column] for row in whole}, key=lambda label: (str(type(label)), label))
    if len(classes) < 2:
        raise ValueError(f"{dataset}: column {options.label_column} has one class only: {classes[0]!r}")
    for row in held_out:
        if row[options.label_column] not in classes:
            raise ValueError(f"{dataset}: class {row[options.label_column]!r} is in the evaluation, not in training")
    return (
        [Sentence(row[columns[0]], row[columns[1]]) for row in _subset(whole, options.train_samples, options.seed)],
        [Sentence(row[columns[0]], row[columns[1]]) for row in _subset(held_out, options.eval_samples, options.seed)],
        classes,
    )


def _evaluation_file(folder: str) -> Path:
    try:
        return data_file(folder, "validation")
    except FileNotFoundError:
        return data_file(folder, "test")


def _subset(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    if not count or count >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _sst2(columns: Sequence[str]) -> tuple[list[Row], list[Row]]:
    from datasets import load_dataset

    try:
        data = load_dataset("nyu-mll/glue", "sst2")
    except (ConnectionError, FileNotFoundError) as error:
        raise RuntimeError(
            f"{SST2} is not on this machine and the Hugging Face hub cannot be reached ({error}); give --dataset a "
            f"folder with train.jsonl and validation.jsonl, whose rows have {' and '.join(columns)}"
        ) from error
    return data["train"].to_list(), data["validation"].to_list()


def encoded(tokenizer: Any, sentences: Sequence[Sentence], classes: Sequence[Any], config: Any) -> list[Row]:
    """Token ids, mask and class number of every sentence, cut to what the model can take."""
    longest = tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else config.max_position_embeddings
    texts = tokenizer([str(sentence.text) for sentence in sentences], truncation=True, max_length=longest)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": classes.index(sentence.label)}
        for ids, mask, sentence in zip(texts["input_ids"], texts["attention_mask"], sentences, strict=True)
    ]

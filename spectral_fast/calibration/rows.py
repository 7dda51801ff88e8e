"""Rows of a data set, from the Hugging Face hub or from a file, for calibration and evaluation."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

GSM8K = "gsm8k"
Row = dict[str, Any]
_SUFFIXES = (".jsonl", ".parquet")


def read_rows(source: str, columns: Sequence[str], split: str, limit: int | None = None) -> list[Row]:
    """The first rows of a data set, in its order, with the wanted columns only.

    Args:
        source: "gsm8k" (from the hub, by `datasets`), a .jsonl or .parquet file, or a folder with a file
            {split}.jsonl or {split}.parquet.
        columns: names of the columns that every row must have.
        split: "train" or "test"; a single file is taken as it is, whatever split is asked for.
        limit: how many rows to take at most; None is all.

    Returns:
        One dictionary per row, never none at all.

    Raises:
        FileNotFoundError: there is no such file, or no file of that split in the folder.
        RuntimeError: GSM8K is not cached on this machine and the hub cannot be reached.
        ValueError: the file is empty or broken, or a row lacks a column, naming line or row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the number of rows to read must be at least 1; got {limit}")
    if source == GSM8K:
        return _take(_gsm8k(split), columns, limit, f"{GSM8K} {split} row")
    path = data_file(source, split)
    if path.suffix == ".parquet":
        rows = _take(_parquet(path, columns), columns, limit, f"{path} row")
    else:
        rows = _take(json_lines(path), columns, limit, f"{path} line")
    if not rows:
        raise ValueError(f"{path} has no rows; want one with {', '.join(columns)} per example")
    return rows


def data_file(source: str, split: str) -> Path:
    """The file that a source other than the hub names: itself, or that of the split in a folder.

    Raises:
        FileNotFoundError, ValueError: as `read_rows` for a file that is missing or of another kind.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / f"{split}{suffix}" for suffix in _SUFFIXES if (path / f"{split}{suffix}").is_file()]
        if not found:
            raise FileNotFoundError(f"folder {path} has neither {split}.jsonl nor {split}.parquet")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"no data set {source!r}: want {GSM8K}, a .jsonl or .parquet file, or a folder with {split}.jsonl"
        )
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} must end in .jsonl or .parquet, got {path.suffix or 'no suffix'}")
    return path


def _take(rows: Iterable[tuple[int, Row]], columns: Sequence[str], limit: int | None, where: str) -> list[Row]:
    taken = []
    for number, row in islice(rows, limit):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            present = ", ".join(column for column in row if row[column] is not None)
            raise ValueError(f"{where} {number} has no {' and no '.join(missing)}; it has {present or 'nothing'}")
        taken.append({column: row[column] for column in columns})
    return taken


def _gsm8k(split: str) -> Iterator[tuple[int, Row]]:
    from datasets import load_dataset

    try:
        data = load_dataset("openai/gsm8k", "main", split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise RuntimeError(
            f"GSM8K is not on this machine and the Hugging Face hub cannot be reached ({error}); give local "
            "data instead: --calib_data FILE to calibrate, --eval_data FILE to evaluate (.jsonl or .parquet)"
        ) from error
    return enumerate(data)


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """The objects in a .jsonl or .jsonl.gz file, each with the number of its line; blank lines are none.

    Raises:
        ValueError: naming the line that is no object.
    """
    # JSON knows its own encodings, and only \n ends a line.
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} must be an object {{...}}; got {type(row).__name__}")
            yield number, row


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            wanted = [column for column in columns if column in present]
            if len(wanted) < len(columns):
                missing = [column for column in columns if column not in present]
                raise ValueError(f"{path} has no column {' and no '.join(missing)}; it has {', '.join(present)}")
            batches = file.iter_batches(batch_size=256, columns=wanted)
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error

"""Rows to train on: their forms, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from spectral_fast.training.data import load_split
from spectral_fast.training.options import DataArguments


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def save(rows: list[dict[str, Any]], file: Path) -> str:
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def split(source: str, limit: int | None = None, **options: Any) -> list[dict[str, Any]]:
    return list(load_split(source, "train", limit, DataArguments(**options), "text", None))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"text": "a", "id": 1}, {"text": "a"}),
        ({"prompt": "a", "completion": "b", "text": "c"}, {"prompt": "a", "completion": "b"}),
        ({"question": "a", "answer": 3}, {"prompt": "Question: a\nAnswer:", "completion": " 3"}),
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_every_form_of_data_is_known_by_its_columns(
    tmp_path: Path, suffix: str, row: dict[str, Any], form: dict[str, Any]
) -> None:
    file = save([row, row, row], tmp_path / f"train{suffix}")
    assert split(file, 2) == [form, form]
    assert split(str(tmp_path)) == [form, form, form]  # a folder, by the name of the split


def test_data_that_cannot_be_trained_on_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has columns a, b; want messages; prompt and completion; text; question"):
        split(save([{"a": 1, "b": 2}], tmp_path / "columns.jsonl"))
    with pytest.raises(ValueError, match=r"row 1 has no answer"):
        split(save([{"question": "a", "answer": "b"}, {"question": "a"}], tmp_path / "hole.jsonl"))
    assert split(save([{"q": "a", "r": "b"}], tmp_path / "named.jsonl"), question_column="q", answer_column="r")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(ValueError, match=r"broken\.jsonl cannot be read as \.jsonl"):
        split(str(tmp_path / "broken.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl cannot be read as \.jsonl: it is empty"):
        split(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="row 0: text must be text; got 5"):
        split(save([{"text": 5}], tmp_path / "number.jsonl"))
    with pytest.raises(ValueError, match="row 0: messages must be a list of messages; got 'hello'"):
        split(save([{"messages": "hello"}], tmp_path / "hello.jsonl"))


def test_a_data_set_of_the_hub_without_a_network_is_an_error_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    for name in ("gsm8k", "someone/something"):
        with pytest.raises(RuntimeError, match=f"{name} is neither a file or folder here nor to be had.*no route"):
            split(name)

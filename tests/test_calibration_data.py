"""Rows of text to token ids and labels: which tokens are labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_fast import embedded
from spectral_fast.calibration.data import (
    Example,
    as_examples,
    encode_messages,
    encode_question_answer,
)
from spectral_fast.calibration.model import ModelOptions, load_tokenizer
from spectral_fast.calibration.packed.packing import packs
from spectral_fast.calibration.probe import CalibrationOptions, load_examples

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(str(embedded.base_model_dir()), ModelOptions())


def prompt_of(example: Example) -> int:
    """Where the labels begin; from there on every id is one."""
    prompt_length = example.labels.count(-100)
    assert example == Example.continuation(example.ids, prompt_length)
    return prompt_length


def test_the_answer_with_one_space_and_the_end_token_are_the_labels(tokenizer: Any) -> None:
    example = encode_question_answer(tokenizer, "How many?", "1+1 = 2\n#### 2")
    prompt_length = prompt_of(example)
    assert tokenizer.decode(example.ids[:prompt_length]) == "Question: How many?\nAnswer:"
    assert tokenizer.decode(example.ids[prompt_length:-1]) == " 1+1 = 2\n#### 2"
    assert example.ids[-1] == tokenizer.eos_token_id
    assert example.n_labels == len(" 1+1 = 2\n#### 2") + 1


def test_the_last_message_of_a_chat_is_the_label(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "4"},
    ]
    example = encode_messages(tokenizer, messages)
    prompt_length = prompt_of(example)
    assert tokenizer.decode(example.ids[:prompt_length]) == "<user>2+2?\n<assistant>5\n<user>no\n<assistant>"
    assert tokenizer.decode(example.ids[prompt_length:]) == "4\n"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"role": "user", "content": "2"}], TEMPLATE, 'role "assistant"'),
        ([], TEMPLATE, 'role "assistant"'),
        ([{"role": "assistant", "content": "2"}], None, "no chat template"),
        (
            [{"role": "user", "content": "2"}, {"role": "assistant", "content": "2"}],
            "{{ messages | length }}",
            "differently from its own prompt",
        ),
    ],
)
def test_chats_without_clear_labels_are_refused(
    tokenizer: Any, messages: Any, template: str | None, message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        encode_messages(tokenizer, messages)


def test_the_first_samples_are_taken_in_order(tokenizer: Any) -> None:
    options = CalibrationOptions(calib_data=str(embedded.calibration_file()), calib_samples=5)
    examples = load_examples(tokenizer, options)
    rows = [json.loads(line) for line in embedded.calibration_file().read_text().splitlines()[:5]]
    assert examples == [encode_question_answer(tokenizer, row["question"], row["answer"]) for row in rows]


def test_chat_rows_from_a_file_name_the_row_that_is_wrong(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (good, good[:1])))
    options = CalibrationOptions(calib_data=str(file), messages_column="messages")
    with pytest.raises(ValueError, match="row 1"):
        load_examples(tokenizer, options)


def test_parquet_is_read_like_json_lines(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in embedded.calibration_file().read_text().splitlines()[:3]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    options = CalibrationOptions(calib_data=str(tmp_path / "rows.parquet"))
    jsonl = CalibrationOptions(calib_data=str(embedded.calibration_file()), calib_samples=3)
    assert load_examples(tokenizer, options) == load_examples(tokenizer, jsonl)


MULTI_TURN = Example((1, 2, 3, 4, 5), (-100, 2, -100, 4, 5))


def test_labels_may_be_any_of_the_tokens() -> None:
    assert MULTI_TURN.n_labels == 3
    assert Example((1, 2), (1, -100)).n_labels == 0  # nothing predicts the first token
    [pack] = packs([MULTI_TURN], 1)
    assert (pack.positions.tolist(), pack.targets.tolist()) == ([0, 2, 3], [2, 4, 5])


@pytest.mark.parametrize("dtype", ["lists", "tensors", "batch"])
def test_rows_of_a_training_loop_become_examples_without_their_padding(dtype: str) -> None:
    right = {
        "input_ids": [1, 2, 3, 4, 5, 0],
        "labels": [-100, 2, -100, 4, 5, -100],
        "attention_mask": [1, 1, 1, 1, 1, 0],
        "token_type_ids": [0] * 6,
    }
    left = {name: column[-1:] + column[:-1] for name, column in right.items()}
    rows = [right, left]
    if dtype == "tensors":
        rows = [{name: torch.tensor(column) for name, column in row.items()} for row in rows]
    if dtype == "batch":
        rows = [{name: torch.tensor([right[name], left[name]]) for name in right}]
    assert as_examples(rows) == [MULTI_TURN, MULTI_TURN]
    assert as_examples([MULTI_TURN, {"input_ids": [1, 0], "labels": [-100, 0]}])[1] == Example((1, 0), (-100, 0))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2], "text": "a"}, "item 1: no labels; it has input_ids, text"),
        ({"input_ids": [1, 2], "labels": [1]}, r"item 1: labels must be as long as input_ids; got \(1, 1\), \(1, 2\)"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "a label is a token id, or -100 where none counts; got -1"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "has a hole"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 1, 0]}, "start again within a row"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_examples([MULTI_TURN, row])


def test_data_that_are_no_rows_are_refused() -> None:
    with pytest.raises(TypeError, match="item 0 must be an Example or a mapping with input_ids; got str"):
        as_examples({"input_ids": [[1]]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a label per token id; got 2 ids, 1 labels"):
        Example((1, 2), (1,))

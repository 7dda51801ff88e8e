"""Rows of data sets from files and from the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectral_fast.calibration.rows import read_rows

COLUMNS = ("question", "answer")
ROWS = [{"question": f"q{i} é\u2028", "answer": f"#### {i}", "other": i} for i in range(5)]
WANTED = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]


def write_jsonl(path: Path, rows: list = ROWS) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list = ROWS) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(params=["jsonl", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[request.param]
    return write(tmp_path / f"data.{request.param}")


def test_a_file_gives_the_wanted_columns_in_its_order(file: str) -> None:
    assert read_rows(file, COLUMNS, "train") == WANTED
    assert read_rows(file, ("other",), "test") == [{"other": i} for i in range(5)]


@pytest.mark.parametrize(("limit", "n"), [(1, 1), (3, 3), (5, 5), (99, 5), (None, 5)])
def test_a_limit_takes_the_first_rows(file: str, limit: int | None, n: int) -> None:
    assert read_rows(file, COLUMNS, "train", limit) == WANTED[:n]


def test_values_may_be_lists(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    for source in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        assert read_rows(source, ["messages"], "train") == rows


def test_a_folder_gives_the_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:2])
    write_parquet(tmp_path / "test.parquet", ROWS[2:])
    assert read_rows(str(tmp_path), COLUMNS, "train") == WANTED[:2]
    assert read_rows(str(tmp_path), COLUMNS, "test") == WANTED[2:]
    with pytest.raises(FileNotFoundError, match=r"neither validation.jsonl nor validation.parquet"):
        read_rows(str(tmp_path), COLUMNS, "validation")


def test_a_limit_stops_before_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nnot json\n")
    assert read_rows(str(path), COLUMNS, "train", 1) == WANTED[:1]


def test_blank_lines_and_a_byte_order_mark_are_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + json.dumps(ROWS[0]) + "\n\n  \n" + json.dumps(ROWS[1]), encoding="utf-8")
    assert read_rows(str(path), COLUMNS, "train") == WANTED[:2]


def test_broken_lines_are_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for bad, message in (("{oops", "is not JSON"), ("[1]", "must be an object"), ("\xff", "is not JSON")):
        path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + bad.encode("latin-1") + b"\n")
        with pytest.raises(ValueError, match=rf"data.jsonl line 3 {message}"):
            read_rows(str(path), COLUMNS, "train")


def test_missing_columns_are_named_with_those_that_there_are(tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError, match=r"data\.\w+ .*has no.* prompt.*it has question, answer, other"):
        read_rows(file, ("prompt",), "train")
    with pytest.raises(ValueError, match=r"has no.* prompt and no reply"):
        read_rows(file, ("prompt", "reply"), "train")
    holed = [ROWS[0], {"question": "q", "answer": None}]
    for source in (write_jsonl(tmp_path / "h.jsonl", holed), write_parquet(tmp_path / "h.parquet", holed)):
        with pytest.raises(ValueError, match=r"h\.\w+ (line 2|row 1) has no answer; it has question$"):
            read_rows(source, COLUMNS, "train")


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data set '/?.*nowhere.jsonl'"):
        read_rows(str(tmp_path / "nowhere.jsonl"), COLUMNS, "train")
    (tmp_path / "data.csv").write_text("question,answer")
    with pytest.raises(ValueError, match=r"data.csv must end in .jsonl or .parquet, got .csv"):
        read_rows(str(tmp_path / "data.csv"), COLUMNS, "train")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl has no rows; want one with question, answer"):
        read_rows(str(tmp_path / "empty.jsonl"), COLUMNS, "train")
    (tmp_path / "fake.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"fake.parquet is not a Parquet file"):
        read_rows(str(tmp_path / "fake.parquet"), COLUMNS, "train")
    with pytest.raises(ValueError, match="at least 1; got 0"):
        read_rows(write_jsonl(tmp_path / "a.jsonl"), COLUMNS, "train", 0)


def test_gsm8k_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: str, **options: str) -> list:
        asked.append((args, options))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_rows("gsm8k", COLUMNS, "test", 2) == WANTED[:2]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_without_a_network_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: str, **__: str) -> list:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(RuntimeError, match=r"Couldn't reach.*--calib_data FILE.*--eval_data FILE"):
        read_rows("gsm8k", COLUMNS, "test")


def test_the_real_gsm8k_has_its_rows(gsm8k: Path) -> None:
    assert len(read_rows(str(gsm8k), COLUMNS, "test")) == 1319
    assert len(read_rows(str(gsm8k), COLUMNS, "train")) == 7473

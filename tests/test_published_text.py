"""What of records and of texts that others wrote is published: no folder of this machine, no empty form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toolbox_tools import peft_adapter

from spectral_fast.publish import push_to_hub
from spectral_fast.publish.paths import hub_name, text_without_paths, without_paths


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("/home/a b/models/llama", "./llama"),
        ("~/x/", "./x"),
        ("../run/..", "./path"),
        ("/", "./path"),
        ("a/b/c", "./c"),
        ("./c", "./c"),
        ("file:///srv/x", "./x"),
        ("/c/models--org--name/snapshots/" + 40 * "0", "org/name"),
        ("no such file: '/home/data/x.jsonl', line 3", "no such file: './x.jsonl', line 3"),
        ("https://huggingface.co/a/b and a/b", "https://huggingface.co/a/b and a/b"),
        ({"/srv/x": ["/srv/y", 1.5, None, True]}, {"./x": ["./y", 1.5, None, True]}),
    ],
)
def test_of_a_path_the_last_part_is_left(value: Any, public: Any) -> None:
    assert without_paths(value) == public


def test_in_a_text_only_homes_and_folders_of_this_machine_are_paths(tmp_path: Path) -> None:
    text = f"{tmp_path}/a.txt, file://{tmp_path}/b, ~/c/d, /usr/bin/env, /api/v1/x, [x](/datasets/a/b), 1/2/3"
    found = text_without_paths(text)
    assert found == "./a.txt, ./b, ./d, /usr/bin/env, /api/v1/x, [x](/datasets/a/b), 1/2/3"


@pytest.mark.parametrize("value", ["gpt2", "org/name", "org/name.v1_x-y"])
def test_names_of_the_hub_are_told_from_paths(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name(value) == value
    (tmp_path / value).mkdir(parents=True)
    assert hub_name(value) is None  # transformers, too, would take what is here
    assert without_paths(value) == (f"./{Path(value).name}" if "/" in value else value)


@pytest.mark.parametrize("value", [None, 3, "", "/x", "./x", "a/b/c", "x y", "data.jsonl", "org/data.parquet"])
def test_what_cannot_be_a_name_of_the_hub_is_none(value: Any) -> None:
    assert hub_name(value) is None


def test_a_form_with_blanks_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "adapter")
    readme = (adapter / "README.md").read_text()
    done = push_to_hub(adapter, "someone/it", dry_run=True)
    assert done.card.endswith("written by spectral_fast, from the files beside it.*\n")
    assert any("fill in or delete each [More Information Needed]" in warning for warning in done.warnings)
    (adapter / "README.md").write_text(readme.replace("[More Information Needed]", "none"))
    assert "- **Hours used:** none" in push_to_hub(adapter, "someone/it", dry_run=True).card

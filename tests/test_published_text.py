"""What of records and of texts that others wrote is published: no folder of this machine, no form left empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toolbox_tools import peft_adapter

from spectral_fast.publish import model_card
from spectral_fast.publish.paths import hub_name, quoted_without_paths, without_paths


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("/home/a b/models/llama", "llama (local)"),
        ("~/x/", "x (local)"),
        ("../run/..", "a path (local)"),
        ("/", "a path (local)"),
        ("a/b/c", "c (local)"),
        ("file:///srv/x", "x (local)"),
        ("/c/models--org--name/snapshots/" + 40 * "0", "org/name"),
        ("no such file: '/srv/data/x.jsonl', line 3", "no such file: 'x.jsonl (local)', line 3"),
        ("https://huggingface.co/a/b and a/b", "https://huggingface.co/a/b and a/b"),
        ({"/srv/x": ["/srv/y", 1.5, None, True]}, {"x (local)": ["y (local)", 1.5, None, True]}),
    ],
)
def test_of_a_path_the_last_part_is_left(value: Any, public: Any) -> None:
    assert without_paths(value) == public


def test_in_a_quoted_text_only_folders_of_this_machine_are_paths(tmp_path: Path) -> None:
    text = f"{tmp_path}/a.txt, file://{tmp_path}/b, ~/c/d, /usr/bin/env, /api/v1/x, [x](/datasets/a/b), 1/2/3"
    found = quoted_without_paths(text)
    assert found == "a.txt (local), b (local), d (local), /usr/bin/env, /api/v1/x, [x](/datasets/a/b), 1/2/3"


@pytest.mark.parametrize("value", ["gpt2", "org/name", "org/name.v1_x-y"])
def test_names_of_the_hub_are_told_from_paths(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name(value) == value
    (tmp_path / value).mkdir(parents=True)
    assert hub_name(value) is None  # transformers, too, would take what is here
    assert without_paths(value) == (f"{Path(value).name} (local)" if "/" in value else value)


@pytest.mark.parametrize("value", [None, 3, "", "/x", "./x", "a/b/c", "x (local)", "data.jsonl", "org/data.parquet"])
def test_what_cannot_be_a_name_of_the_hub_is_none(value: Any) -> None:
    assert hub_name(value) is None


def test_of_pefts_own_form_only_what_somebody_filled_in_is_left(tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "adapter")
    readme = (adapter / "README.md").read_text()
    assert readme.count("[More Information Needed]") > 20
    (adapter / "README.md").write_text(
        readme.replace("- **Hours used:** [More Information Needed]", "- **Hours used:** 3")
    )
    below = model_card(adapter).text.partition("came with the adapter's folder")[2]
    assert "More Information Needed" not in below
    assert "- **Hours used:** 3" in below
    assert "- PEFT " in below
    assert below.count("#") == len(["##", "Environmental", "Impact"][0]) + len(["###", "Framework", "versions"][0])

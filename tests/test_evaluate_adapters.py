"""`eval`, `edit --eval_gsm8k` and `demo` from end to end, on few problems of the embedded default."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, with_lora

from spectral_fast import embedded
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.cli import main
from spectral_fast.embedded.make import make_tokenizer
from spectral_fast.evaluation.engines import EngineOptions, Sampling, open_engine
from spectral_fast.evaluation.engines.transformers import TransformersEngine

BASE = ["--base_model", str(embedded.base_model_dir())]
ADAPTER = str(embedded.adapter_dir())
HELDOUT = str(embedded.heldout_file())


def test_eval_scores_an_adapter_and_records_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--eval_data", HELDOUT, "--fewshot", "0", "--max_samples", "24", "--max_tokens", "110"]
    (tmp_path / "recipe.json").write_text("{}")
    out = [
        "--config_src",
        str(tmp_path / "recipe.json"),
        "--out_dir",
        str(tmp_path / "results"),
        "--out_json",
        str(tmp_path / "deeper" / "result.json"),
    ]
    assert main(["eval", *BASE, "--lora_dir", ADAPTER, *task, *out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in Path(result["predictions_path"]).read_text().splitlines()]
    assert result["total"] == len(rows) == 24
    assert result["correct"] == sum(row["correct"] for row in rows) >= 12
    assert json.loads((tmp_path / "deeper" / "result.json").read_text()) == result
    config = json.loads((tmp_path / "results" / "eval_config.json").read_text())
    assert config["engine"] == "transformers"
    assert config["engine_settings"]["dtype"] == "float32"
    assert config["meta"]["adapter_files_sha256"]["adapter_model.safetensors"]
    assert config["meta"]["config_src"]["path"] == str(tmp_path / "recipe.json")
    assert config["meta"]["config_src"]["sha256"].startswith("44136fa355b3678a")  # of {}


def test_eval_of_the_base_model_alone_needs_no_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = ["--eval_data", HELDOUT, "--fewshot", "0", "--max_samples", "2", "--max_tokens", "4", "--max_loras", "3"]
    assert main(["eval", *BASE, "--base_only", *task, "--engine", "transformers"]) == 0
    assert "--max_loras has no effect: the engine is transformers" in capsys.readouterr().err
    assert json.loads((tmp_path / "eval_config.json").read_text())["meta"]["lora_dir"] is None
    for which in ([], ["--base_only", "--lora_dir", ADAPTER]):
        with pytest.raises(SystemExit) as ended:
            main(["eval", *BASE, *which])
        assert ended.value.code == 2
        assert "give --lora_dir for an adapter, or --base_only for the base model" in capsys.readouterr().err


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
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        with_lora(tiny_llama(vocab_size=100), init_lora_weights=init).save_pretrained(folder)
    prompts, sampling = ["abc", "defgh"], Sampling(24)
    with TransformersEngine(str(tmp_path / "base"), ModelOptions()) as engine:
        first, second, base = (engine.generate(prompts, sampling, folder) for folder in (*folders, None))
    assert first == second
    assert base != first


def test_each_prompt_is_answered_by_its_own_adapter(tmp_path: Path) -> None:
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        with_lora(tiny_llama(vocab_size=100), seed).save_pretrained(tmp_path / str(seed))
    prompts, chosen = ["abc", "abc", "defgh", "abc", "defgh"], [None, "2", "1", "1", "2"]
    folders = [None if name is None else tmp_path / name for name in chosen]
    counts: list[int] = []
    with TransformersEngine(str(tmp_path / "base"), ModelOptions(), batch_size=2) as engine:
        alone = [engine.generate([p], Sampling(24), folder)[0] for p, folder in zip(prompts, folders, strict=True)]
        assert engine.generate(prompts, Sampling(24), folders, progress=counts.append) == alone
        assert engine.settings["dtype"] == "float32"
        with pytest.raises(ValueError, match="one for all prompts or one per prompt: 2 for 5"):
            engine.generate(prompts, Sampling(24), folders[:2])
        with pytest.raises(FileNotFoundError, match="not a folder"):
            engine.generate(prompts, Sampling(24), tmp_path / "nothing")
    assert sum(counts) == 5
    assert len({text for [text] in alone}) == 5


def test_half_of_a_pair_of_factors_is_not_made_up(tmp_path: Path) -> None:
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with_lora(tiny_llama(vocab_size=100)).save_pretrained(tmp_path / "half")
    weights = tmp_path / "half" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, weights)
    with (
        TransformersEngine(str(tmp_path / "base"), ModelOptions()) as engine,
        pytest.raises(ValueError, match="has one factor only"),
    ):
        engine.generate(["abc"], Sampling(4), tmp_path / "half")


def test_what_vllm_does_not_do_is_refused() -> None:
    for flag, options in (
        ("load_in_4bit", ModelOptions(load_in_4bit=True)),
        ("device_map", ModelOptions(device_map="auto")),
    ):
        with pytest.raises(ValueError, match=f"--{flag} is for --engine transformers"):
            open_engine("none", options, EngineOptions(engine="vllm"))
    with pytest.raises(ValueError, match="gpu_memory_utilization must be above 0, at most 1"):
        EngineOptions(gpu_memory_utilization=0.0)


def test_auto_takes_vllm_only_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "vllm").mkdir()  # a folder of that name is no package
    assert EngineOptions().chosen() == "transformers"
    (tmp_path / "vllm" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert EngineOptions().chosen() == "vllm"
    assert EngineOptions(engine="transformers").chosen() == "transformers"


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match=r"--engine vllm needs vLLM.*spectral-fast\[eval\].*eval-cpu"):
        open_engine(str(embedded.base_model_dir()), ModelOptions(), EngineOptions(engine="vllm"))

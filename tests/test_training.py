"""Trainings on the embedded model: what they write, what they train on, how they go on."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from spectral_fast import Adapter, embedded
from spectral_fast.allocation import get_adaptive_lora_config
from spectral_fast.calibration.data import encode_question_answer
from spectral_fast.calibration.model import ModelOptions, load_tokenizer
from spectral_fast.cli import main
from spectral_fast.training import callbacks, load, train
from spectral_fast.training.callbacks import BatchTimeCallback, SystemMonitor

BASE = str(embedded.base_model_dir())
WORDS = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--logging_steps", "2"]
FLAGS = {
    "model_name_or_path": BASE,
    "train_dataset_path": str(embedded.calibration_file()),
    "train_samples": 16,
    "lora_r": 4,
    "lora_target_modules": ["q_proj", "down_proj"],
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def run(out: Path, *words: str, overwrite: bool = False, **flags: Any) -> dict[str, Any]:
    given = [*WORDS, "--no_gradient_checkpointing", "--output_dir", str(out), *words]
    return train(load(None, FLAGS | flags, given), overwrite=overwrite)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command, with a file and flags."""
    out = tmp_path_factory.mktemp("training") / "run"
    config = out.with_name("config.yaml")
    keys = {**FLAGS, "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2}
    config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    more = ["--val_dataset_path", str(embedded.heldout_file()), "--val_samples", "4", "--system_monitor"]
    assert main(["train", "--config", str(config), *WORDS, "--no-gradient-checkpointing", *more, "--json"]) == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(out / "final_checkpoint" / "adapter_model.safetensors")
    return loaded


def test_a_run_leaves_its_settings_its_log_and_an_adapter(trained: Path) -> None:
    written = json.loads((trained / "training_params.json").read_text())
    assert set(written) == {"loramodel_args", "training_args", "data_args", "rank_assignment_args"}
    assert written["loramodel_args"]["lora_r"] == 4
    assert written["training_args"]["learning_rate"] == 1e-3
    assert written["data_args"]["log_file_path"] == str(trained / "run.log")
    log = (trained / "run.log").read_text()
    assert '"trainable_parameters"' in log
    assert log.count('"learning_rate"') == 2
    assert '"eval_loss"' in log
    usage = (trained / "system_monitoring" / "usage.jsonl").read_text().splitlines()
    assert json.loads(usage[-1])["process_memory_bytes"] > 0
    adapter = Adapter.open(trained / "final_checkpoint")
    assert {module.name.rpartition(".")[2] for module in adapter.modules.values()} == {"q_proj", "down_proj"}
    assert all(b.any() for key, b in weights(trained).items() if "lora_B" in key)
    assert not list(trained.glob(".*"))


def test_probe_edit_and_eval_take_the_adapter_as_it_is(trained: Path, tmp_path: Path) -> None:
    adapter = str(trained / "final_checkpoint")
    base, data = ["--base_model", BASE], ["--calib_data", str(embedded.calibration_file()), "--calib_samples", "2"]
    probed, edited = str(tmp_path / "probed"), str(tmp_path / "edited")
    assert main(["probe", *base, *data, "--lora_path", adapter, "--out_dir", probed]) == 0
    assert main(["edit", "--lora_path", adapter, "--sensitivity", probed, "--out_dir", edited]) == 0
    problems = ["--eval_data", str(embedded.heldout_file()), "--max_samples", "2", "--fewshot", "0"]
    assert main(["eval", *base, *problems, "--max_tokens", "4", "--lora_dir", edited]) == 0


def test_a_resumed_run_ends_with_the_same_weights(trained: Path, tmp_path: Path) -> None:
    begun = tmp_path / "run"
    shutil.copytree(trained, begun, ignore=shutil.ignore_patterns("checkpoint-4", "final_checkpoint"))
    for name, flags in (("r", {"lora_r": 8}), ("lora_alpha", {"lora_alpha": 3}), ("use_rslora", {"use_rslora": True})):
        with pytest.raises(ValueError, match=rf"checkpoint-2 has {name} = .*give the same"):
            run(begun, "--resume_from_checkpoint", "latest", **flags)
    for name, before, now in (("learning_rate", 0.001, 0.5), ("seed", 42, 5)):
        with pytest.raises(ValueError, match=f"checkpoint-2 was made with {name} = {before}, this run has {now}; give"):
            run(begun, "--resume_from_checkpoint", "latest", f"--{name}", str(now))
    with pytest.raises(ValueError, match="was made with train_samples = 16, this run has 3; give the same"):
        run(begun, "--resume_from_checkpoint", "latest", train_samples=3)
    shutil.copytree(begun / "checkpoint-2", begun / "checkpoint-3")
    (begun / "checkpoint-3" / "trainer_state.json").unlink()  # as if the run had been killed while it wrote
    words = ["--save_steps", "2", "--resume_from_checkpoint"]
    for checkpoint in ("latest", str(trained / "checkpoint-2")):
        result = run(begun, *words, checkpoint)
        assert result["steps"] == 4
        got, wanted = weights(begun), weights(trained)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
        shutil.rmtree(begun / "checkpoint-4")
    with pytest.raises(
        ValueError, match=r"checkpoint-2 has target_modules = \['down_proj', 'q_proj'\], this run \['q_"
    ):
        run(begun, *words, str(trained / "checkpoint-2"), lora_target_modules=["q_proj", "up_proj"])
    with pytest.raises(ValueError, match="checkpoint-2 holds an adapter, and use_peft is off"):
        run(begun, *words, str(trained / "checkpoint-2"), use_peft=False)
    log = (begun / "run.log").read_text()
    assert log.count("trainable_parameters") == 3
    assert (log.count('step 2: {"loss"'), log.count('step 4: {"loss"')) == (1, 3)  # nothing was done again
    with pytest.raises(ValueError, match=r"checkpoint-4 is at step 4 of max_steps = 4: it is the end already"):
        run(begun, *words, str(trained / "checkpoint-4"))
    with pytest.raises(FileNotFoundError, match="has no checkpoint to resume from"):
        run(tmp_path / "new", *words, "true")
    with pytest.raises(FileNotFoundError, match="is no whole checkpoint of a trainer"):
        run(begun, *words, str(tmp_path))


def test_an_earlier_run_is_replaced_only_if_that_is_asked_for(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"checkpoint-2 is there from an earlier run: --overwrite it"):
        run(out)
    with pytest.raises(ValueError, match=r"the training diverged: .* is not finite after step 6; lower learning_rate"):
        run(out, "--max_steps", "6", "--learning_rate", "1e30", overwrite=True, lora_target_modules=["all-linear"])
    assert not (out / "final_checkpoint").exists()  # neither of this run nor of the one before
    assert not (out / "system_monitoring").exists()
    run(out, "--max_steps", "1", overwrite=True)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (out / "notes.txt").read_text() == "mine"
    (out / "training_params.json").unlink()
    with pytest.raises(FileExistsError, match=r"has no training_params\.json, so it is something else"):
        run(out, overwrite=True)


def test_several_gpus_and_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(None, FLAGS, ["--output_dir", str(tmp_path / "run")])
    settings.training._n_gpu = 2
    with pytest.raises(RuntimeError, match="works on one GPU, and 2 are seen: CUDA_VISIBLE_DEVICES=0"):
        train(settings)
    settings.training._n_gpu = 0
    monkeypatch.setattr(type(settings.training), "world_size", 2)
    with pytest.raises(RuntimeError, match="one process, and 2 were started"):
        train(settings)


def test_nothing_is_written_before_the_inputs_are_known_to_be_right(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no base model: give model_name_or_path"):
        run(out, model_name_or_path=None)
    with pytest.raises(ValueError, match="no data: give train_dataset_path"):
        run(out, train_dataset_path=None)
    with pytest.raises(FileNotFoundError, match="no data set"):
        run(out, train_dataset_path=str(tmp_path / "absent.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        run(out, model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="nowhere_proj"):
        run(out, lora_target_modules=["nowhere_proj"])
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(NotADirectoryError, match="output_dir must be a folder"):
        run(out)


@pytest.mark.parametrize(("name", "vectors"), [("use_rslora", 0), ("use_dora", 8)])
def test_variants_of_lora_reach_the_adapter(tmp_path: Path, name: str, vectors: int) -> None:
    run(tmp_path / "run", "--max_steps", "1", **{name: True})
    assert getattr(PeftConfig.from_pretrained(str(tmp_path / "run" / "final_checkpoint")), name)
    assert sum("lora_magnitude_vector" in key for key in weights(tmp_path / "run")) == vectors


def test_without_peft_the_whole_model_is_trained(tmp_path: Path) -> None:
    result = run(tmp_path / "run", "--max_steps", "1", use_peft=False)
    assert result["trainable_parameters"] > 3_000_000
    assert (tmp_path / "run" / "final_checkpoint" / "config.json").is_file()


@pytest.mark.parametrize("bits", ["use_qlora", "load_in_4bit", "load_in_8bit"])
def test_without_bitsandbytes_its_extra_is_named(tmp_path: Path, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectral_fast.training.adapter.find_spec", lambda _: None)
    count = 8 if bits == "load_in_8bit" else 4
    with pytest.raises(RuntimeError, match=rf"{count} bits per weight need bitsandbytes.*spectral-fast\[bnb\]"):
        run(tmp_path / "run", **{bits: True})
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"load_in_8bit": True}, {"adaptive_ranks": True}])
def test_qlora_trains_between_evaluations(tmp_path: Path, more: dict[str, Any]) -> None:
    words = ["--eval_strategy", "steps", "--eval_steps", "1"]
    held_out = {"val_dataset_path": str(embedded.heldout_file()), "val_samples": 2}
    result = run(tmp_path / "run", *words, use_qlora=True, **held_out, **more)
    assert all(b.any() for key, b in weights(tmp_path / "run").items() if "lora_B" in key)
    assert result["eval_loss"] < 2.5


def test_ranks_follow_the_spectra_and_meet_a_budget(tmp_path: Path) -> None:
    linear = {"lora_target_modules": ["all-linear"]}
    uniform = run(tmp_path / "uniform", "--max_steps", "1", **linear)
    flags = {"adaptive_ranks": True, "budget_uniform_rank": 4, "max_rank": 32, **linear}
    adaptive = run(tmp_path / "adaptive", "--max_steps", "1", **flags)
    assert abs(adaptive["trainable_parameters"] / uniform["trainable_parameters"] - 1) <= 0.01
    pattern = adaptive["rank_pattern"]
    preset = {"exclude_modules": ("lm_head",), "budget_uniform_rank": 4}
    wanted = get_adaptive_lora_config(BASE, maximum_rank=32, **preset)
    assert (pattern, len(pattern)) == (wanted.rank_pattern, 14)
    config = PeftConfig.from_pretrained(str(tmp_path / "adaptive" / "final_checkpoint"))
    assert (config.r, config.alpha_pattern) == (wanted.r, wanted.alpha_pattern)
    adapter = Adapter.open(tmp_path / "adaptive" / "final_checkpoint")
    ranks = {module.name.removeprefix("base_model.model."): module.r for module in adapter.modules.values()}
    assert len(set(ranks.values())) > 2
    assert sorted(ranks.values()) == sorted(pattern.values())


def test_ranks_follow_a_sensitivity_file(tmp_path: Path) -> None:
    source, probed = ["--base_model", BASE, "--lora_path", str(embedded.adapter_dir())], tmp_path / "probed"
    data = ["--calib_data", str(embedded.calibration_file()), "--calib_samples", "2"]
    assert main(["probe", *source, *data, "--out_dir", str(probed)]) == 0
    flags = {"adaptive_ranks": True, "sensitivity": str(probed), "lora_target_modules": ["down_proj"]}
    pattern = run(tmp_path / "run", "--max_steps", "1", **flags)["rank_pattern"]
    assert pattern == get_adaptive_lora_config(BASE, sensitivity=probed, target_modules=("down_proj",)).rank_pattern
    assert len(pattern) == 2


def save(rows: list[dict[str, Any]], file: Path) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows_of_the_trainer(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str, **flags: Any) -> list[Any]:
    """What the trainer makes of the data; nothing is trained."""
    import trl

    seen: list[Any] = []

    def stop(trainer: Any, **_: Any) -> None:
        seen.extend(trainer.train_dataset)
        raise InterruptedError

    monkeypatch.setattr(trl.SFTTrainer, "train", stop)
    with pytest.raises(InterruptedError):
        run(out, *words, **flags)
    return seen


def test_questions_and_answers_are_trained_on_as_they_are_calibrated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(BASE, ModelOptions())
    rows = [json.loads(line) for line in embedded.calibration_file().read_text().splitlines()[:16]]
    wanted = [encode_question_answer(tokenizer, row["question"], row["answer"]) for row in rows]
    got = rows_of_the_trainer(monkeypatch, tmp_path / "run")
    assert [(tuple(row["input_ids"]), tuple(row["labels"])) for row in got] == [(e.ids, e.labels) for e in wanted]


def test_messages_go_through_a_chat_template_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    file = save([{"messages": messages}] * 4, tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"has messages, and .* no chat template: give chat_template_path"):
        run(tmp_path / "run", train_dataset_path=file)
    (tmp_path / "chat.txt").write_text(TEMPLATE)
    with pytest.raises(ValueError, match=r"chat_template_path .*chat\.txt must end in \.jinja or \.j2"):
        run(tmp_path / "run", "--chat_template_path", str(tmp_path / "chat.txt"), train_dataset_path=file)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    words = ["--chat_template_path", str(tmp_path / "chat.jinja")]
    got = rows_of_the_trainer(monkeypatch, tmp_path / "run", *words, train_dataset_path=file)
    tokenizer = load_tokenizer(BASE, ModelOptions())
    assert tokenizer.decode(got[0]["input_ids"]) == "user: 1+1<eos>assistant: 2<eos>"
    assert got[0]["labels"] == got[0]["input_ids"]


def test_prompts_of_messages_and_their_tools_reach_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "1+1"}], [{"role": "assistant", "content": "2"}]
    row = {"prompt": turns[0], "completion": turns[1], "tools": '[{"name": "add"}]'}
    file = save([row] * 4, tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"has messages, and .* no chat template: give chat_template_path"):
        run(tmp_path / "run", train_dataset_path=file)
    (tmp_path / "chat.jinja").write_text("{{ tools[0]['name'] + ': ' }}" + TEMPLATE)
    words = ["--chat_template_path", str(tmp_path / "chat.jinja")]
    got = rows_of_the_trainer(monkeypatch, tmp_path / "run", *words, train_dataset_path=file)
    tokenizer = load_tokenizer(BASE, ModelOptions())
    assert tokenizer.decode(got[0]["input_ids"]) == "add: user: 1+1<eos>assistant: 2<eos>"
    assert tokenizer.decode([label for label in got[0]["labels"] if label != -100]) == "2<eos>"


def test_packed_rows_are_trained_on(tmp_path: Path) -> None:
    result = run(tmp_path / "run", "--packing", "--max_length", "512", "--max_steps", "1")
    assert result["steps"] == 1


def test_the_time_of_a_batch_is_told_every_fifty_steps_over_the_last_hundred(caplog: pytest.LogCaptureFixture) -> None:
    callback = BatchTimeCallback(logging.getLogger("test"))
    with caplog.at_level(logging.INFO):
        for step in range(1, 201):
            callback.on_step_begin()
            callback.on_step_end(None, SimpleNamespace(global_step=step))
    told = [record.getMessage() for record in caplog.records]
    assert [message.partition(":")[0] for message in told] == ["step 50", "step 100", "step 150", "step 200"]
    assert [message.rpartition(" ")[2] for message in told] == ["50", "100", "100", "100"]


def test_the_monitor_writes_at_its_interval_until_the_context_is_left(tmp_path: Path) -> None:
    file = tmp_path / "system_monitoring" / "usage.jsonl"
    with SystemMonitor(tmp_path, interval=0.05):
        while not file.is_file() or file.read_text().count("\n") < 3:
            time.sleep(0.01)
    assert "system monitor" not in [thread.name for thread in threading.enumerate()]
    *rows, _ = map(json.loads, file.read_text().splitlines())  # the last was written when the context was left
    assert all(later["time"] - row["time"] >= 0.048 for row, later in pairwise(rows))  # told to the millisecond
    assert all(row["memory_percent"] > 0 for row in rows)


def test_the_monitor_asks_nvidias_library_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    fake: Any = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=10 + gpu, total=20),
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=30 + gpu),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert callbacks._gpus() == [0, 1]
    assert callbacks._usage(1) == {"gpu_percent": 31, "memory_bytes": 11, "memory_total_bytes": 20}

    def without_driver() -> None:
        raise NVMLError

    fake.nvmlInit = without_driver
    assert callbacks._gpus() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert callbacks._gpus() == []

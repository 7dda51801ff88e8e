"""`train` with a gate: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectral_fast import embedded
from spectral_fast.cli import main
from spectral_fast.training import load, train

FLAGS: dict[str, Any] = {
    "model_name_or_path": str(embedded.base_model_dir()),
    "train_dataset_path": str(embedded.calibration_file()),
    "train_samples": 16,
    "lora_r": 2,
    "lora_target_modules": ["q_proj"],
    "lora_dropout": 0.1,
    "slora_enable": True,
    "slora_burn_in": 1,
    "slora_m": 64,
    "slora_k": 8,
    "slora_target_novelty": 0.6,
    "slora_novelty_ema_rate": 0.1,
}
WORDS = ["--max_steps", "6", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--logging_steps", "1"]
MORE = ["--save_steps", "3", "--gradient_accumulation_steps", "2", "--no_gradient_checkpointing"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def run(out: Path, *words: str, overwrite: bool = False, **flags: Any) -> dict[str, Any]:
    return train(load(None, FLAGS | flags, [*WORDS, *MORE, "--output_dir", str(out), *words]), overwrite=overwrite)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("gated") / "run"
    return out, run(out)


def test_a_gated_run_tells_what_it_decided(trained: tuple[Path, dict[str, Any]]) -> None:
    out, result = trained
    metrics = json.loads((out / "gate_metrics.json").read_text())
    assert result["gate"] == {name: metrics[name] for name in result["gate"]}
    assert metrics["total_steps"] == 12
    assert 1 < metrics["accepted_steps"] < 12
    assert 0 < metrics["optimizer_steps"] <= result["steps"] == 6
    parameters = json.loads((out / "training_params.json").read_text())
    assert (parameters["gate_args"]["m"], parameters["gate_args"]["gate"]) == (64, "novelty")
    history = json.loads((out / "log_history.json").read_text())
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1]["gate/accepted_steps"] == metrics["accepted_steps"]
    assert sum(entry["loss"] for entry in losses) / 6 == pytest.approx(result["train_loss"])
    assert '"gate/novelty"' in (out / "run.log").read_text()


def test_a_resumed_run_decides_and_ends_as_the_whole_one(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, begun = trained[0], tmp_path / "run"
    shutil.copytree(out, begun, ignore=shutil.ignore_patterns("checkpoint-6", "final_checkpoint"))
    result = run(begun, "--resume_from_checkpoint", "latest")
    assert result["gate"] == trained[1]["gate"]
    assert (begun / "gate_metrics.json").read_text() == (out / "gate_metrics.json").read_text()
    got, wanted = (load_file(x / "final_checkpoint" / "adapter_model.safetensors") for x in (begun, out))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    logs = [json.loads((x / "log_history.json").read_text())[:6] for x in (begun, out)]
    for entry in (*logs[0], *logs[1]):
        entry.pop("num_tokens")  # TRL counts from a resumption on
    assert logs[0] == logs[1]


def test_a_checkpoint_is_gone_on_from_with_its_gate_only(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    words = ["--resume_from_checkpoint", str(trained[0] / "checkpoint-3")]
    with pytest.raises(ValueError, match="checkpoint-3 holds the state of a gate, and slora_enable is off"):
        run(tmp_path / "run", *words, slora_enable=False)
    with pytest.raises(ValueError, match="the gate was made with k = 8, this one has 4"):
        run(tmp_path / "run", *words, slora_k=4)
    shutil.copytree(trained[0] / "checkpoint-3", tmp_path / "checkpoint-3", ignore=shutil.ignore_patterns("gate.pt"))
    with pytest.raises(ValueError, match="checkpoint-3 holds the state of no gate, and slora_enable is on"):
        run(tmp_path / "run", "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"of max_optimizer_steps = 1: it is the end already"):
        run(tmp_path / "run", *words, slora_max_optimizer_steps=1)
    assert not list((tmp_path / "run").iterdir())


def test_a_burn_in_beyond_the_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="burn_in = 8 micro-batches are all accepted, and num_train_epochs gives 8:"):
        run(tmp_path / "run", "--max_steps", "-1", "--num_train_epochs", "1", slora_burn_in=8)
    assert not list((tmp_path / "run").iterdir())


def test_a_gate_and_splines_are_trained_together(tmp_path: Path) -> None:
    spline = {"use_spline": True, "num_knots": 6, "spline_reg_weight": 0.5}
    result = run(tmp_path / "run", **spline)
    assert 1 < result["gate"]["accepted_steps"] < 12
    assert result["splines"]["deviation"] > 1e-5
    history = json.loads((tmp_path / "run" / "log_history.json").read_text())
    assert all({"gate/novelty", "spline/deviation"} <= set(entry) for entry in history if "loss" in entry)
    parameters = json.loads((tmp_path / "run" / "training_params.json").read_text())
    assert {"gate_args", "spline_args"} <= set(parameters)
    begun = tmp_path / "begun" / "run"
    shutil.copytree(tmp_path / "run", begun, ignore=shutil.ignore_patterns("checkpoint-6", "final_checkpoint"))
    assert run(begun, "--resume_from_checkpoint", "latest", **spline)["gate"] == result["gate"]
    files = [x / "final_checkpoint" / "adapter_model.safetensors" for x in (begun, tmp_path / "run")]
    got, wanted = (load_file(file) for file in files)
    assert got.keys() == wanted.keys()
    assert any("spline" in name for name in wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_replaced_run_leaves_no_decisions(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    run(tmp_path / "run", "--max_steps", "1", overwrite=True, slora_enable=False)
    assert not (tmp_path / "run" / "gate_metrics.json").exists()


def test_the_command_says_what_was_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "")
    monkeypatch.delenv("WANDB_PROJECT")  # and back to what it was afterwards
    text = {**FLAGS, "output_dir": str(tmp_path / "run"), "slora_gate": "random", "slora_max_optimizer_steps": 2}
    text["logging"] = {"use_wandb": False, "wandb_project": "some"}
    (tmp_path / "train.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in text.items()))
    flags = ["--slora_seed", "1", "--slora_target_novelty", "0.3"]
    assert main(["train", "--config", str(tmp_path / "train.yaml"), *WORDS, *flags, "--no_gradient_checkpointing"]) == 0
    assert os.environ["WANDB_PROJECT"] == "some"
    metrics = json.loads((tmp_path / "run" / "gate_metrics.json").read_text())
    assert (metrics["optimizer_steps"], metrics["novelty_history"], metrics["avg_novelty"]) == (2, [], None)
    total = metrics["total_steps"]
    told = f"the gate accepted 2 of {total} micro-batches ({2 / total:.1%}), which made 2 steps of the optimizer"
    assert told in capsys.readouterr().out

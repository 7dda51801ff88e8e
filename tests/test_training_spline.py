"""Training an LS-LoRA on the embedded model: settings, penalty, how it goes on, and that it is evaluated as it is."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lslora_tools import splined as splined_model
from peft import get_peft_model
from safetensors.torch import load_file
from test_training import BASE, FLAGS, WORDS, run
from tiny_models import tiny_llama

from spectral_fast import embedded
from spectral_fast.cli import main
from spectral_fast.lslora import LSLoraConfig, read_splines, spline_parameters, spline_penalty, splines_of
from spectral_fast.splines import mean_facts
from spectral_fast.training import load
from spectral_fast.training.spline import splined

OUT = ["--output_dir", "run"]
SPLINE = {"use_spline": True, "num_knots": 6}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of the command, from a file."""
    out = tmp_path_factory.mktemp("training") / "run"
    config = out.with_name("config.yaml")
    spline = {**SPLINE, "spline_reg_weight": 0.5}
    config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**FLAGS, "spline": spline}.items()))
    words = [*WORDS, "--no-gradient-checkpointing", "--save_steps", "2", "--output_dir", str(out)]
    with redirect_stdout(StringIO()) as told:
        assert main(["train", "--config", str(config), *words, "--json"]) == 0
    return out, json.loads(told.getvalue())


def weights(out: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(out / "final_checkpoint" / "adapter_model.safetensors")
    return loaded


def test_a_run_leaves_splines_their_facts_and_their_picture(trained: tuple[Path, dict[str, Any]]) -> None:
    out, result = trained
    splines = read_splines(out / "final_checkpoint")
    assert len(splines) == 8
    assert all(spline.deviation > 1e-4 for spline in splines.values())
    assert result["splines"] == {"parameters": 8 * (6 + 2), **mean_facts(splines.values())}
    assert (out / "final_checkpoint" / "splines.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "training_params.json").read_text())
    assert written["spline_args"]["num_knots"] == 6
    log = (out / "run.log").read_text()
    assert log.count('"spline/deviation"') == log.count('"spline/output_scale"') == 2


def test_a_resumed_run_ends_with_the_same_splines(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    begun = tmp_path / "run"
    shutil.copytree(trained[0], begun, ignore=shutil.ignore_patterns("checkpoint-4", "final_checkpoint"))
    words = ["--save_steps", "2", "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="has peft_type = LSLORA, this run LORA; give the same"):
        run(begun, *words)
    with pytest.raises(ValueError, match="has num_knots = 6, this run 5; give the same"):
        run(begun, *words, use_spline=True)
    assert run(begun, *words, **SPLINE, spline_reg_weight=0.5)["steps"] == 4
    got, wanted = weights(begun), weights(trained[0])
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_it_is_evaluated_as_it_is_and_neither_probed_nor_edited(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(trained[0] / "final_checkpoint")
    base = ["--base_model", BASE]
    task = ["--eval_data", str(embedded.heldout_file()), "--max_samples", "2", "--fewshot", "0", "--max_tokens", "4"]
    assert main(["eval", *base, *task, "--lora_dir", adapter, "--engine", "transformers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 2
    assert main(["probe", *base, "--lora_path", adapter, "--out_dir", str(trained[0] / "probed")]) != 0
    assert "describes an LS-LoRA" in capsys.readouterr().err


def test_adaptive_ranks_go_with_splines(tmp_path: Path) -> None:
    flags = {
        **SPLINE,
        "adaptive_ranks": True,
        "budget_uniform_rank": 4,
        "max_rank": 32,
        "clamp": False,
        "lora_target_modules": ["all-linear"],
    }
    result = run(tmp_path / "run", "--max_steps", "1", **flags)
    assert len(set(result["rank_pattern"].values())) > 1
    config = json.loads((tmp_path / "run" / "final_checkpoint" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["clamp"], config["rank_pattern"]) == ("LSLORA", False, result["rank_pattern"])


class Trainer:
    """What `splined` needs of a trainer."""

    current_gradient_accumulation_steps = 4

    def __init__(self, model: Any) -> None:
        self.model, self.logged = model, []
        self.model_accepts_loss_kwargs, self.compute_loss_func = True, None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:  # noqa: ARG002
        return (torch.tensor(2.0), "outputs") if return_outputs else torch.tensor(2.0)

    def log(self, logs: dict[str, float], *_: Any) -> None:
        self.logged.append(logs)


@pytest.mark.parametrize(("items", "share"), [(None, 1), (100, 4)])
def test_the_penalty_is_added_once_per_step_and_only_in_training(items: int | None, share: int) -> None:
    model = get_peft_model(tiny_llama(), LSLoraConfig(target_modules=["q_proj"]))
    for parameter in spline_parameters(model):
        parameter.data = (parameter.data + 1).bfloat16()  # as TRL makes it for a quantised base
    trainer = splined(Trainer)(model)
    assert {parameter.dtype for parameter in spline_parameters(model)} == {torch.float32}
    penalty = spline_penalty(model).item()
    assert penalty == pytest.approx(0.01)
    model.train()
    assert trainer.compute_loss(model, {}, num_items_in_batch=items).item() == pytest.approx(2 + penalty / share)
    loss, outputs = trainer.compute_loss(model, {}, return_outputs=True, num_items_in_batch=items)
    assert (loss.item(), outputs) == (pytest.approx(2 + penalty / share), "outputs")
    assert trainer.compute_loss(model.eval(), {}, num_items_in_batch=items).item() == 2
    trainer.log({"loss": 1.0})
    trainer.log({"eval_loss": 1.0})
    means = mean_facts(splines_of(model).values())
    assert trainer.logged == [
        {"loss": 1.0, **{f"spline/{name}": value for name, value in means.items()}},
        {"eval_loss": 1.0},
    ]


@pytest.mark.parametrize(
    ("how", "items", "share"),
    [
        ({"loss_is_scaled_for_ga": False}, 100, 1),  # what TRL's RewardTrainer says
        ({"loss_is_scaled_for_ga": True}, None, 4),
        ({"model_accepts_loss_kwargs": False}, 100, 1),
        ({"model_accepts_loss_kwargs": False, "compute_loss_func": len}, 100, 4),
    ],
)
def test_the_penalty_is_shared_out_where_the_trainer_does_not(how: dict[str, Any], items: Any, share: int) -> None:
    model = splined_model(spline_reg_weight=1.0)
    trainer = splined(Trainer)(model)
    vars(trainer).update(how)
    wanted = 2 + spline_penalty(model).item() / share
    assert trainer.compute_loss(model.train(), {}, num_items_in_batch=items).item() == pytest.approx(wanted)


def test_weight_decay_leaves_splines_alone(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    trainer = splined(Trainer)(splined_model(), args)
    groups = trainer.create_optimizer().param_groups
    splines = {id(p) for p in spline_parameters(trainer.model)}
    assert len(splines) == 27
    for group in groups:
        held = {id(p) for p in group["params"]}
        assert held == splines if group["weight_decay"] == 0 else held.isdisjoint(splines)


def test_a_preset_fills_in_what_is_not_given(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("spline: {use_spline: true, spline_preset: V3, k_max: 2.0}\nlora_r: 4\n")
    spline = load(file, {"num_knots": 9}, OUT).spline
    assert (spline.interpolation_method, spline.spline_output_scale, spline.spline_tanh) == ("soft", 0.1, False)
    assert (spline.k_min, spline.k_max, spline.num_knots) == (-3.0, 2.0, 9)
    assert "use_spline" not in spline.shape()
    assert LSLoraConfig(**spline.shape()).k_max == 2.0


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"num_knots": 7}, "num_knots is for use_spline, which is off"),
        ({"spline_preset": "V0"}, "k_min is for use_spline, which is off"),
        ({"use_spline": True, "use_dora": True}, "plain LoRA, and use_dora is on"),
        ({"use_spline": True, "use_peft": False}, "plain LoRA, and use_peft is off"),
        ({"use_spline": True, "spline_preset": "V9"}, "must be one of V0, V1, V2"),
        ({"use_spline": True, "spline_preset": ["V0"]}, "spline_preset must be str; got "),
    ],
)
def test_what_is_without_effect_is_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, TypeError), match=complaint):
        load(None, given, OUT)


@pytest.mark.filterwarnings("ignore")
def test_splines_stand_on_quantised_layers(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for bits in ("load_in_4bit", "load_in_8bit"):
        run(tmp_path / bits, "--max_steps", "2", use_spline=True, **{bits: True})
        found = load_file(tmp_path / bits / "final_checkpoint" / "adapter_model.safetensors")

        assert all(tensor.dtype == torch.float32 for key, tensor in found.items() if "spline" in key)
        assert all(spline.deviation > 0 for spline in read_splines(tmp_path / bits / "final_checkpoint").values())

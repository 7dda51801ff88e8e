"""What a YAML file and flags make of a training, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cli_tools import refused

from spectral_fast.cli import main
from spectral_fast.training import Settings, load
from spectral_fast.training.gate import KINDS
from spectral_fast.training.options import GateArguments

PAGE = Path(__file__).parents[1] / "docs" / "train.md"
OUT = ["--output_dir", "run"]


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def of(tmp_path: Path, text: str, *words: str, **flags: Any) -> Settings:
    return load(write(tmp_path, text), flags, [*OUT, *words])


def test_without_a_file_the_defaults_are_those_of_the_script() -> None:
    settings = load(None, {}, OUT)
    model, ranks = settings.model, settings.ranks
    assert (model.lora_r, model.lora_alpha, model.lora_dropout, model.use_peft) == (16, 32, 0.05, True)
    assert (model.lora_task_type, model.bnb_4bit_quant_type, model.bits) == ("CAUSAL_LM", "nf4", None)
    assert (ranks.top_n_percentile, ranks.min_rank, ranks.max_rank, ranks.rank_scaling) == (0.5, 4, 64, "linear")
    assert (ranks.alpha_factor, ranks.w_hill, ranks.w_mp_spikes) == (2.0, 0.7, 0.3)
    assert settings.run_name == "run"


def test_keys_stand_in_sections_or_at_the_top(tmp_path: Path) -> None:
    flat = of(tmp_path, "lora_r: 4\nlearning_rate: 1e-3\ntrain_samples: 3\nadaptive_ranks: true\nmax_steps: 7")
    inside = of(
        tmp_path,
        "model: {lora_r: 4}\ntraining: {learning_rate: 1e-3, max_steps: 7}\n"
        "data: {train_samples: 3}\nranks: {adaptive_ranks: true}",
    )
    for settings in (flat, inside):
        assert settings.model.lora_r == 4
        assert (settings.training.learning_rate, settings.training.max_steps) == (1e-3, 7)
        assert settings.data.train_samples == 3
        assert settings.ranks.adaptive_ranks


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    text = "lora_r: 4\nlora_alpha: 5\nmax_steps: 7\nseed: 3\ngradient_checkpointing: false\noutput_dir: elsewhere"
    settings = of(tmp_path, text, "--max_steps", "9", "--gradient_checkpointing", lora_r=8)
    assert (settings.model.lora_r, settings.model.lora_alpha) == (8, 5)
    assert (settings.training.max_steps, settings.training.seed) == (9, 3)
    assert settings.training.gradient_checkpointing is True
    assert settings.training.output_dir == "run"


def test_null_and_structures_reach_the_trainer_as_they_are(tmp_path: Path) -> None:
    text = "max_length: null\nlora_r: null\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}"
    settings = of(tmp_path, text)
    assert settings.training.max_length is None
    assert settings.model.lora_r == 16
    assert settings.training.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_the_file_in_the_documentation_is_understood(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(# train\.yaml.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    settings = load(write(tmp_path, text), {})
    assert settings.ranks.budget_uniform_rank == settings.model.lora_r == 16
    assert settings.training.packing


def test_one_module_needs_no_list(tmp_path: Path) -> None:
    assert of(tmp_path, "lora_target_modules: q_proj").model.lora_target_modules == ("q_proj",)
    assert of(tmp_path, "lora_target_modules: all-linear").model.adapts_all


ORIGINAL = """
model: {name: some/model, use_flash_attention_2: false, load_in_4bit: false, bnb_4bit_compute_dtype: bfloat16,
        bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: false}
training: {output_dir: run, num_train_epochs: 1, max_steps: 1000, per_device_train_batch_size: 16,
           gradient_accumulation_steps: 4, gradient_checkpointing: false, learning_rate: 2e-5,
           lr_scheduler_type: cosine, warmup_ratio: 0.03, weight_decay: 0.01, bf16: false, max_grad_norm: 1.0,
           logging_steps: 10, save_strategy: steps, save_steps: 2000, save_total_limit: 2, evaluation_strategy: steps,
           eval_steps: 300, load_best_model_at_end: false, seed: 42, dataloader_num_workers: 4,
           dataloader_pin_memory: false, remove_unused_columns: false}
lora: {r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: [q_proj, v_proj], bias: none, task_type: CAUSAL_LM}
slora: {enable: true, m: 256, k: 32, target_novelty: 0.08, target_novelty_scaler: 10.0, novelty_ema_rate: 0.01,
        burn_in: 200, seed: 7, reorth_every: 12, k_topk: 32}
data: {dataset_name: some/data, train_split: "train[:1000]", eval_split: "train[1000:1100]", max_seq_length: 256,
       prompt_field: q, response_field: a}
logging: {use_wandb: false, wandb_project: slora, wandb_run_name: first, report_to: none}
"""


def test_the_yaml_of_the_original_is_read_as_it_stands(tmp_path: Path) -> None:
    settings = load(write(tmp_path, ORIGINAL), {})
    model, training, data, gate = settings.model, settings.training, settings.data, settings.slora
    assert (model.name, model.attn_implementation, model.bits) == ("some/model", None, None)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (8, 16, 0.0)
    assert model.lora_target_modules == ("q_proj", "v_proj")
    assert (training.warmup_steps, training.eval_strategy, training.max_length) == (0.03, "steps", 256)
    assert (training.seed, training.report_to, settings.run_name) == (42, [], "first")
    assert training.project == "slora"
    assert (data.train_dataset_path, data.val_dataset_path) == ("some/data", "some/data")
    assert (data.train_split, data.val_split) == ("train[:1000]", "train[1000:1100]")
    assert (data.question_column, data.answer_column) == ("q", "a")
    assert (gate.enable, gate.gate, gate.m, gate.k, gate.seed, gate.burn_in) == (True, "novelty", 256, 32, 7, 200)
    assert (gate.target_novelty, gate.target_novelty_scaler, gate.reorth_every, gate.k_topk) == (0.08, 10.0, 12, 32)


def test_other_words_of_the_original_are_understood(tmp_path: Path) -> None:
    text = "model: {use_flash_attention_2: true}\nslora: {enable: false, novelty_scaler: 20}"
    settings = of(tmp_path, text)
    assert settings.model.attn_implementation == "flash_attention_2"
    assert (settings.slora.enable, settings.slora.target_novelty_scaler) == (False, 20.0)


def test_keys_of_the_gate_have_a_prefix_outside_of_its_section(tmp_path: Path) -> None:
    flat = of(tmp_path, "slora_enable: true\nslora_seed: 3\nslora_m: 99\nseed: 4")
    inside = of(tmp_path, "slora: {enable: true, seed: 3, m: 99}\ntraining: {seed: 4}")
    for settings in (flat, inside):
        assert (settings.slora.enable, settings.slora.seed, settings.slora.m, settings.training.seed) == (
            True,
            3,
            99,
            4,
        )
    assert not of(tmp_path, "slora: {enable: true, m: 99}", slora_enable=False).slora.enable


@pytest.mark.parametrize("kind", KINDS)
def test_settings_open_every_gate(kind: str) -> None:
    gate = GateArguments(enable=True, gate=kind, m=32, k=4, burn_in=5, target_novelty=0.4).open(16, 50)
    assert (gate.target, gate.burn_in) == (0.4, 5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lora_alfa: 4", "unknown key 'lora_alfa'; is lora_alpha meant"),
        ("learning_rat: 4", "unknown key 'learning_rat'; is learning_rate meant"),
        ("model: {max_steps: 4}", "max_steps is a key of section training, not of model"),
        ("model: {lora_r: 4}\nlora_r: 8", "lora_r stands there twice"),
        ("lora_r: 4\nlora_r: 8", "'lora_r' stands there twice"),
        ("model: 3", "section model must hold keys and values; got 3"),
        ("- lora_r", "must hold keys and values; got list"),
        ("lora_r: 0", "lora_r must be at least 1; got 0"),
        ("lora_r: 4.5", "lora_r must be int; got 4.5"),
        ("rank_scaling: square", "rank_scaling must be one of linear, log, sqrt"),
        ("max_steps: many", "max_steps.*invalid int value: 'many'"),
        ("learning_rate: [1e-3, 1e-4]", r"learning_rate must be a plain value; got \[0\.001, 0\.0001\]"),
        ("packing_strategy: tight", "packing_strategy.*invalid choice: 'tight'"),
        ("load_in_4bit: true\nload_in_8bit: true", "load_in_8bit and load_in_4bit exclude each other"),
        ("use_dora: true\nuse_peft: false", "use_dora is for an adapter, and use_peft is off"),
        ("adaptive_ranks: true\nuse_peft: false", "adaptive_ranks is for an adapter, and use_peft is off"),
        ("sensitivity: ./probed", "sensitivity is for adaptive_ranks, which is off"),
        ("packing: true\ntrain_sampling_strategy: group_by_length", "group_by_length and packing exclude each other"),
        ("group_by_length: true", "is train_sampling_strategy: group_by_length meant"),
        ("max_seq_length: 256", "is max_length meant"),
        ("model_init_kwargs: {revision: main}", "unknown key 'model_init_kwargs'"),
        ("run_name: a/b", "has no slashes; got 'a/b'"),
        ("slora: {m: 64}", "slora_m is for a gate, and slora_enable is not said"),
        ("slora: {enable: true, m: 8, k: 9}", "k must be <= m = 8; got 9"),
        ("slora: {enable: true, gate: luck}", "gate must be one of novelty, loss_floor, both, random; got 'luck'"),
        ("slora: {enable: true, target_novelty: 0}", "target_novelty must be above 0"),
        ("slora: {enable: true, burnin: 3}", "unknown key 'burnin'; is slora_burn_in meant"),
        ("slora: {enable: true, max_steps: 3}", "max_steps is a key of section training, not of slora"),
        ("slora: {enable: true, slora_seed: 3, seed: 4}", "seed stands there twice"),
        (
            "slora: {enable: true}\nmax_steps: 2000",
            "burn_in = 2000 micro-batches .* max_steps gives 2000: the gate would",
        ),
        ("lora: {bias: all}", "bias of section lora can be none only, got 'all'"),
        ("lora: {r: 4}\nlora_r: 4", "lora_r stands there twice"),
        ("model: {bnb_4bit_compute_dtype: float16}", "can be bfloat16 only, got 'float16': give dtype"),
        ("slora: {enable: true, gate: both, target_novelty: 1}", "target_novelty must be < 1; got 1.0"),
        ("name: gpt2", "unknown key 'name'"),
        ("a: [", "is not YAML that can be read"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises((ValueError, TypeError), match=complaint):
        of(tmp_path, text)


def test_a_flag_takes_back_what_the_file_turns_on_or_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("spectral_fast.training.train", lambda settings, **_: seen.append(settings))
    file = write(
        tmp_path,
        "model_name_or_path: x\ntrain_dataset_path: x\nuse_dora: true\nuse_peft: false\n"
        "output_dir: run\ngradient_checkpointing: true\nslora: {enable: true}",
    )
    monkeypatch.setenv("SPECTRAL_FAST_DEBUG", "1")
    with pytest.raises(TypeError):  # there is no result to print
        main(
            [
                "train",
                "--config",
                str(file),
                "--no-use-dora",
                "--use_peft",
                "--no_gradient_checkpointing",
                "--no_slora_enable",
            ]
        )
    assert not seen[0].model.use_dora
    assert not seen[0].slora.enable
    assert seen[0].model.use_peft
    assert not seen[0].training.gradient_checkpointing


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--max_stepz", "4"], "unknown flag --max_stepz; is --max_steps meant"),
        (["--lora_rr=4"], "unknown flag --lora_rr; is --lora_r meant"),
        (["--model_init_kwargs", "{}"], "unknown flag --model_init_kwargs"),
        (["--seed", "x"], "seed: invalid int value: 'x'"),
        (["stray"], "unknown flag stray"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(words: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load(None, {}, [*OUT, *words])


def test_a_run_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder for the run: give output_dir"):
        load(None, {})
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "absent.yaml", {}, OUT)


def test_without_trl_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from spectral_fast.training import settings

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RuntimeError, match=r"pip install 'spectral-fast\[train\]'"):
        settings.sft_config_class()


@pytest.mark.parametrize(
    ("words", "missing"),
    [([], "no base model: give model_name_or_path"), (["--model_name_or_path=x"], "no data: give train_dataset_path")],
)
def test_a_command_line_without_model_or_data_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], missing: str
) -> None:
    assert missing in refused(capsys, "train", "--output_dir", tmp_path / "out", *words)

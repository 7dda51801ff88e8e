"""Configurations of a sweep: grids, the keys of the method's own files, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectral_fast.evaluation.profiles import EvaluationOptions, HumanEvalOptions
from spectral_fast.policies import AbsSelect, GradientDescent, RandomIndex, SpectralGate
from spectral_fast.sweep.config import Config, load_configs, parse
from spectral_fast.sweep.files import read_configs

BASE = {"base_model": "base", "lora_repo_id": "org/adapter"}


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


def configs(folder: Path, text: str) -> list[dict]:
    return [given for _, given in read_configs(yaml_file(folder, text))]


def test_lists_expand_to_all_their_combinations(tmp_path: Path) -> None:
    found = configs(tmp_path, "edit_mode: [abs_select, gd]\nseed: [1, 2, 3]\nnotes: x\n")
    assert len(found) == 6
    assert {(c["edit_mode"], c["seed"]) for c in found} == {(m, s) for m in ("abs_select", "gd") for s in (1, 2, 3)}
    assert all(c["notes"] == "x" for c in found)


def test_a_list_of_grids_and_merge_keys(tmp_path: Path) -> None:
    text = "- &base {base_model: b, seed: 1}\n- {<<: *base, seed: [2, 3]}\n"
    assert configs(tmp_path, text) == [{"base_model": "b", "seed": seed} for seed in (1, 2, 3)]


def test_target_modules_are_one_list_unless_its_items_are_lists(tmp_path: Path) -> None:
    assert configs(tmp_path, "target_modules: [o_proj, q_proj]") == [{"target_modules": ["o_proj", "q_proj"]}]
    found = configs(tmp_path, "target_modules: [[o_proj], [q_proj, v_proj], all-linear]")
    assert [c["target_modules"] for c in found] == [["o_proj"], ["q_proj", "v_proj"], "all-linear"]
    assert parse("x", {**BASE, **found[2]}, {}).selection.target_modules == ("all-linear",)


def test_a_number_with_an_exponent_is_a_number_in_yaml(tmp_path: Path) -> None:
    assert configs(tmp_path, "z_fallback_std: 1e-4\neta: 2E3\nnotes: e5\n") == [
        {"z_fallback_std": 1e-4, "eta": 2000.0, "notes": "e5"}
    ]


def test_a_line_of_the_method_s_own_files_is_understood() -> None:
    line = {
        "task": "gsm8k_full",
        "base_model": "meta-llama/Llama-2-7b-hf",
        "lora_repo_id": "org/adapter",
        "lora_local_path": "/adapters/a",
        "edit_mode": "abs_select",
        "seed": 42,
        "calib_samples": 64,
        "calib_batch_size": 2,
        "out_dir": "_runs/x/1",
        "run_root": "_runs/x",
        "keep_adapter": True,
        "notes": "preset math_default",
        "core_frac": 0.12,
        "amp_factor": 1.18,
        "preserve_energy": "l2",
        "smooth_temperature": 0.35,
        "z_high": 1.0,
        "robust_z_high": 1.7,
        "soft_temperature": 0.35,
        "soft_pivot_mode": "median",
        "eval_fewshot": 5,
        "eval_max_samples": -1,
        "eval_temperature": 0,
        "eval_max_tokens": 512,
        "eval_profile": "paper_math",
        "target_modules": ["down_proj", "o_proj"],
        "mid_factor": None,
    }
    config = parse("line 1", line, {})
    assert config.policy == AbsSelect(core_frac=0.12, amp_factor=1.18, preserve_energy="l2")
    assert (config.lora, config.label, config.seed, config.keep_adapter) == ("/adapters/a", "org/adapter", 42, True)
    assert config.calibration is not None
    assert (config.calibration.calib_samples, config.profile) == (64, "paper_math")
    assert isinstance(config.evaluation, EvaluationOptions)
    assert (config.evaluation.fewshot, config.evaluation.max_tokens, config.greedy) == (5, 512, True)
    gate = parse("line 1", {**line, "edit_mode": "spectral_gate", "soft_pivot_mode": "mean"}, {})
    assert gate.policy == SpectralGate(amp_factor=1.18, preserve_energy="l2", soft_pivot_mode="mean")
    assert parse("line 1", {**line, "edit_mode": "random_index"}, {}).policy == RandomIndex(
        core_frac=0.12, amp_factor=1.18, preserve_energy="l2", seed=42
    )
    assert parse("line 1", {**BASE, "edit_mode": "gd", "eta": 3}, {}).policy == GradientDescent(eta=3.0)
    original = parse("line 1", {**line, "edit_mode": "baseline"}, {})
    assert (original.policy, original.calibration, original.mode) == (None, None, "baseline")


def test_a_configuration_of_humaneval_has_its_own_keys() -> None:
    given = {**BASE, "task": "humaneval_full", "eval_n_generations": 5, "eval_temperature": 0.2, "eval_fewshot": 5}
    config = parse("x", given, {})
    assert config.evaluation == HumanEvalOptions(n_generations=5, temperature=0.2)
    assert (config.task, config.greedy) == ("humaneval", False)
    with pytest.raises(ValueError, match="profile paper_math is one of gsm8k, not of humaneval"):
        parse("x", {**given, "eval_profile": "paper_math"}, {})


def test_what_a_configuration_does_not_say_comes_from_the_command_line() -> None:
    defaults = {"base_model": "b", "eval_max_samples": 7, "calib_samples": 3}
    config: Config = parse("x", {"lora_repo_id": "a", "calib_samples": 4}, defaults)
    assert config.calibration is not None
    assert (config.base_model, config.evaluation.max_samples, config.calibration.calib_samples) == ("b", 7, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"amp_fctor": 1.2}, "unknown key 'amp_fctor'; is amp_factor meant?"),
        ({"zzzzz": 1}, "unknown key 'zzzzz'$"),
        ({"eval_batchsize": 1}, "unknown key 'eval_batchsize'"),
        ({"edit_mode": "spectral"}, "edit_mode must be one of baseline, abs_select"),
        ({"task": "mmlu"}, "task must be one of gsm8k_full"),
        ({"seed": -1}, "seed must be 0 to 4294967295"),
        ({"seed": 1.5}, "seed must be int; got 1.5"),
        ({"seed": True}, "seed must be int; got True"),
        ({"amp_factor": "1.2"}, "amp_factor must be float; got '1.2'"),
        ({"amp_factor": float("nan")}, "amp_factor must be finite"),
        ({"core_frac": 2}, "core_frac must be 0 to 1"),
        ({"keep_adapter": "yes"}, "keep_adapter must be bool"),
        ({"calib_samples": 0}, "calib_samples must be at least 1"),
        ({"target_modules": []}, "target_modules must be a list of names"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"eval_max_tokens": 0}, "max_tokens must be at least 1"),
        ({"eval_profile": "best"}, "eval_profile must be one of"),
        ({"base_model": None}, "no base model"),
        ({"lora_repo_id": None}, "no adapter"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_place(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"grid line 3: .*{message}"):
        parse("grid line 3", {**BASE, **given}, {})


def test_all_wrong_configurations_are_named_up_to_five(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({**BASE, "seed": -i}) + "\n" for i in range(9)))
    with pytest.raises(ValueError) as error:
        load_configs(path, {})
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("c.jsonl line 2: seed")
    assert lines[-1] == "and 3 more"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", "", "has no configurations"),
        ("c.jsonl", "{\n", "c.jsonl line 1: "),
        ("c.jsonl", "[1]\n", "is an object of keys and values; got list"),
        ("c.jsonl", '{"seed": 1, "seed": 2}\n', "key 'seed' stands there twice"),
        ("c.jsonl", '{"seed": []}\n', "seed is an empty list"),
        ("c.jsonl", '{"seed": {"a": 1}}\n', "seed must be a value or a list of values; got dict"),
        ("c.jsonl", '{"seed": [[1]]}\n', "seed must be a value or a list of values; got list"),
        ("c.jsonl", '{"seed": ' + "[" * 100_000 + "\n", "c.jsonl line 1: "),
        ("c.jsonl", '{"notes": "\\ud800"}\n', "c.jsonl line 1: notes is no text"),
        ("c.yaml", "a: [1\n", "is not YAML that can be read"),
        ("c.yaml", "seed: 1\nseed: 2\n", "key 'seed' stands there twice"),
        ("c.yaml", "1: 2\n", "a key must be a name; got 1"),
        ("c.yaml", "x: !!python/object/apply:os.system [echo]\n", "is not YAML that can be read"),
        ("c.yaml", "- 3\n", "got int"),
        ("c.yaml", "".join(f"k{i}: [1,2,3,4,5,6,7,8,9,10]\n" for i in range(40)), "more than 100,000 combinations"),
        ("c.yaml", "a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n", "b must be a value"),
        ("c.txt", "{}", "configurations are read from"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_configs(tmp_path / name)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file of configurations"):
        read_configs(tmp_path / "none.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_configs(tmp_path / "c.jsonl")

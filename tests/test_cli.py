"""The commands as a user types them, on the embedded model: results, refusals, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_fast import backends, embedded
from spectral_fast.backends import Backend
from spectral_fast.cli import main
from spectral_fast.sensitivity import Sensitivity

BASE = ["--base_model", str(embedded.base_model_dir())]
LORA = ["--lora_path", str(embedded.adapter_dir())]
DATA = ["--calib_data", str(embedded.calibration_file()), "--calib_samples", "4"]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe") / "probed"
    assert main(["probe", *BASE, *LORA, *DATA, "--out_dir", str(folder), "--json"]) == 0
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return loaded


def test_edit_in_one_go_equals_probe_then_edit(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "edit", *BASE, *LORA, *DATA, "--out_dir", tmp_path / "one", "--json")
    assert status == 0
    result = json.loads(out)
    assert result["modules"] == 8
    assert (result["samples_used"], result["stable"]) == (4, None)
    assert result["stability"] == Sensitivity.load(probed).record["stability"]
    assert run(capsys, "edit", *LORA, "--sensitivity", probed, "--out_dir", tmp_path / "two")[0] == 0
    one, two, source = tensors(tmp_path / "one"), tensors(tmp_path / "two"), tensors(embedded.adapter_dir())
    assert all(torch.equal(one[key], two[key]) for key in source)
    changed = {key for key in source if not torch.equal(one[key], source[key])}
    assert changed == {key for key in source if "o_proj" in key or "down_proj" in key}


def test_the_meta_file_holds_every_flag_of_the_run(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--mode", "smooth_abs", "--amp_factor", "1.5", "--no_smooth_align_mid", "--layer_min", "1", "--seed", "7"]
    assert run(capsys, "edit", *LORA, "--sensitivity", probed, "--out_dir", tmp_path / "out", *flags)[0] == 0
    content = json.loads((tmp_path / "out" / "spectral_edit_meta.json").read_text())
    meta = content["meta"]
    wanted = {
        "base_model": BASE[1],
        "lora_path": LORA[1],
        "target_modules": ["down_proj", "o_proj"],
        "layer_min": 1,
        "layer_max": 10**9,
        "calib_samples": 4,
        "calib_batch_size": 2,
        "mode": "smooth_abs",
        "core_frac": 0.2,
        "amp_factor": 1.5,
        "smooth_align_mid": False,
        "grad_norm": "mean_abs",
        "preserve_energy": "l1",
        "seed": 7,
    }
    assert {key: meta[key] for key in wanted} == wanted
    assert meta["probe"]["calib_data_sha256"]
    assert len(content["sigma_stats"]) == 6


def test_random_index_needs_neither_base_model_nor_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in ("1", "1", "2"):
        out = tmp_path / f"control{len(list(tmp_path.iterdir()))}"
        assert run(capsys, "edit", *LORA, "--mode", "random_index", "--seed", seed, "--out_dir", out)[0] == 0
    first, again, other = (tensors(tmp_path / f"control{i}") for i in range(3))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "abs_select", "--z_high", "2"], "--z_high is a flag of mode z_score"),
        (["--mode", "gd", "--amp_factor", "2"], "mode gd takes --"),
        (["--mode", "nonsense"], "invalid choice: 'nonsense'"),
        (["--mode", "abs_select"], "needs --base_model to measure sensitivities, or --sensitivity"),
        (["--mode", "random_index", "--core_fraction", "2"], "unrecognized arguments: --core_fraction"),
        (["--mode", "random_index", "--eval_gsm8k"], "--eval_gsm8k needs --base_model"),
        ([*BASE, "--stream", "--load_in_4bit"], "--stream and --load_in_4bit exclude each other"),
        (["--calib_samples", "0"], "argument --calib_samples: must be at least 1; got 0"),
        (["--core_frac", "7"], "argument --core_frac: must be 0 to 1; got 7"),
        (["--core_frac", "x"], "argument --core_frac: invalid float value: 'x'"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(capsys, "edit", *LORA, "--out_dir", tmp_path / "out", *argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_flag_may_be_spelt_with_dashes_or_with_underscores(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--base-model", BASE[1], "--lora-path", LORA[1], "--calib-data", DATA[1], "--calib-samples=4"]
    assert run(capsys, "probe", *base, "--out-dir", tmp_path / "dash-ed")[0] == 0
    sensitivity = "sensitivity.safetensors"
    assert (tmp_path / "dash-ed" / sensitivity).read_bytes() == (probed / sensitivity).read_bytes()


def test_an_edit_by_streaming_is_that_of_the_model_in_memory_and_leaves_no_work_behind(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--out_dir", tmp_path / "out", "--stream", "--activation-memory", "1MB"]
    assert run(capsys, "edit", *BASE, *LORA, *DATA, *argv)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run(capsys, "edit", *LORA, "--sensitivity", probed, "--out_dir", tmp_path / "other")[0] == 0
    got, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "other")
    assert all(torch.allclose(got[key], wanted[key], rtol=0, atol=1e-6) for key in wanted)


def test_a_killed_probe_goes_on_only_when_it_shall(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectral_fast.calibration.streaming.stream import _Sweeps

    argv = ["probe", *BASE, *LORA, *DATA, "--out_dir", tmp_path / "out", "--stream"]
    with monkeypatch.context() as killed:
        killed.setattr(_Sweeps, "_loss", lambda *_: signal.raise_signal(signal.SIGTERM))
        status, _, err = run(capsys, *argv)
    assert status == 143
    assert err.endswith("half-written. The same command with --resume goes on from here.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    status, _, err = run(capsys, *argv)
    assert status == 1
    assert "go on with it by --resume" in err
    assert run(capsys, *argv, "--resume")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    got, wanted = Sensitivity.load(tmp_path / "out"), Sensitivity.load(probed)
    for name, module in wanted.modules.items():
        torch.testing.assert_close(got.modules[name].g, module.g, rtol=0, atol=1e-5 * module.g.abs().max().item())


def break_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def put_nan(folder: Path) -> None:
    weights = tensors(folder)
    key = next(key for key in weights if "layers.2.self_attn.o_proj.lora_B" in key)
    weights[key][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def transpose(folder: Path) -> None:
    weights = tensors(folder)
    key = next(key for key in weights if "o_proj.lora_A" in key)
    weights[key] = weights[key].mT.contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def remove_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "is not JSON"),
        (put_nan, "layers.2.self_attn.o_proj"),
        (cut_off, "adapter_model.safetensors"),
        (transpose, "adapter_config.json says r=32 but"),
        (remove_weights, "has neither adapter_model.safetensors nor adapter_model.bin"),
        (shutil.rmtree, "is no local folder"),
    ],
)
def test_a_broken_adapter_is_refused_without_a_traceback_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    shutil.copytree(embedded.adapter_dir(), tmp_path / "adapter")
    damage(tmp_path / "adapter")
    left = sorted(path.name for path in tmp_path.iterdir())
    argv = ["--lora_path", tmp_path / "adapter", "--mode", "random_index", "--out_dir", tmp_path / "out"]
    status, out, err = run(capsys, "edit", *argv)
    assert status == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--calib_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--question_column", "problem"], "no problem"),
        (["--target_modules", "gate_proj"], "the adapter has"),
        (["--layer_min", "9"], "from layer 9 on; the adapter has"),
        (["--layer_min", "8", "--layer_max", "9"], "in layers 8 to 9; the adapter has"),
        (["--base_model", "no/such/model/anywhere"], "cannot load base model"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--messages_column", "answer"], "row 0"),
    ],
)
def test_what_probe_cannot_do_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    status, out, err = run(capsys, "probe", *BASE, *LORA, *DATA, "--out_dir", tmp_path / "out", *argv)
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_model_is_refused_by_the_module_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_models import tiny_llama

    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "other")
    for file in embedded.base_model_dir().glob("token*"):
        shutil.copy(file, tmp_path / "other")
    argv = [*LORA, *DATA, "--base_model", tmp_path / "other", "--out_dir", tmp_path / "out"]
    status, _, err = run(capsys, "probe", *argv)
    assert status == 1
    assert "was made for another base model: its model.layers.0" in err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_replaced_only_on_demand_and_the_source_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(embedded.adapter_dir(), source)
    edit = ["edit", "--lora_path", source, "--mode", "random_index", "--out_dir"]
    assert run(capsys, *edit, tmp_path / "out")[0] == 0
    status, _, err = run(capsys, *edit, tmp_path / "out")
    assert status == 1
    assert "--overwrite" in err
    assert run(capsys, *edit, tmp_path / "out", "--overwrite", "--seed", 3)[0] == 0
    for inside in (source, source / "deeper", tmp_path):
        assert run(capsys, *edit, inside, "--overwrite")[0] == 1
    assert {path.name: path.read_bytes() for path in source.iterdir()} == {
        path.name: path.read_bytes() for path in embedded.adapter_dir().iterdir()
    }


def test_a_sensitivity_of_another_adapter_is_refused_by_its_hash(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "edit", *LORA, "--mode", "random_index", "--out_dir", tmp_path / "other")[0] == 0
    argv = ["--lora_path", tmp_path / "other", "--sensitivity", probed, "--out_dir", tmp_path / "out"]
    status, _, err = run(capsys, "edit", *argv)
    assert status == 1
    assert "measured on another adapter" in err
    assert not (tmp_path / "out").exists()


IMPORTS = """
import sys
import torch
before = set(sys.modules)
from spectral_fast.cli import main
assert main(sys.argv[1:]) == 0
print(*sorted(set(sys.modules) - before))
"""


def test_an_edit_with_sensitivities_imports_no_library_of_models_or_pictures(probed: Path, tmp_path: Path) -> None:
    argv = ["edit", *LORA, "--sensitivity", str(probed), "--out_dir", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", IMPORTS, *argv], capture_output=True, text=True, check=True)
    new = result.stdout.splitlines()[-1].split()
    assert "spectral_fast.edit" in new
    # numpy comes with torch, a module of it need not.
    packages = {name.partition(".")[0] for name in new} - sys.stdlib_module_names
    assert packages <= {"numpy", "safetensors", "spectral_fast", "tqdm"}
    assert "torch._dynamo" not in new  # as slow to import as torch itself


def test_gsm8k_itself_can_be_probed_on(gsm8k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--calib_data", gsm8k / "train.jsonl", "--calib_samples", 3, "--out_dir", tmp_path / "out", "--json"]
    status, out, _ = run(capsys, "probe", *BASE, *LORA, *argv)
    assert status == 0
    assert json.loads(out)["samples_used"] == 3


def test_info_tells_which_backend_every_op_takes_and_why_others_refuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run(capsys, "info")[1]
    for op in ("lowrank_svd", "recompose", "sensitivity", "batched_svd", "spectral_linear_forward"):
        assert f"\n{op} takes " in text
    reasons = {"cpu": "no AVX", "gpu": "torch sees no GPU", "reference": None}
    row = tuple(Backend(name, lambda *_, reason=reason: reason, print) for name, reason in reasons.items())
    monkeypatch.setitem(backends._registered, "a", row)
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0
    refusals = {"cpu": "no AVX", "gpu": "torch sees no GPU"}
    assert json.loads(out)["ops"]["a"] == {"takes": "reference", "refusals": refusals, "gpu": False}
    text = "a takes reference; cpu refuses: no AVX; gpu refuses: torch sees no GPU"
    assert text in run(capsys, "info")[1].splitlines()


def test_what_a_run_reads_is_not_lost_by_overwriting(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(embedded.adapter_dir(), out)
    shutil.copytree(probed, out / "probed")
    with pytest.raises(SystemExit):
        run(capsys, "edit", *LORA, "--sensitivity", out / "probed", "--out_dir", out, "--overwrite")
    assert "is inside --out_dir" in capsys.readouterr().err
    assert (out / "probed" / "sensitivity.json").is_file()
    shutil.copy(embedded.calibration_file(), out / "probed" / "mine.jsonl")
    mine = ["--calib_data", str(out / "probed" / "mine.jsonl"), "--calib_samples", "2", "--overwrite"]
    with pytest.raises(SystemExit):
        run(capsys, "probe", *BASE, *LORA, *mine, "--out_dir", out / "probed")
    assert (out / "probed" / "mine.jsonl").is_file()


def test_a_report_replaces_nothing_without_being_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, letter = tmp_path / "source", tmp_path / "letter.txt"
    shutil.copytree(embedded.adapter_dir(), source)
    letter.write_text("dear")
    argv = ["--lora_path", source, "--mode", "random_index", "--out_dir", tmp_path / "out"]
    for report in (source / "adapter_config.json", letter, tmp_path):
        with pytest.raises(SystemExit):
            run(capsys, "edit", *argv, "--report", report)
    assert letter.read_text() == "dear"
    assert not (tmp_path / "out").exists()
    assert run(capsys, "edit", *argv, "--report", tmp_path / "new.html")[0] == 0
    assert "random_index" in (tmp_path / "new.html").read_text()


def test_flags_without_effect_are_said_and_not_recorded(
    probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--base_model", "some/other", "--calib_samples", 64, "--eval_fewshot", 0, "--out_dir", tmp_path / "out"]
    status, _, err = run(capsys, "edit", *LORA, "--sensitivity", probed, *argv)
    assert status == 0
    for flag in ("--base_model", "--calib_samples", "--eval_fewshot"):
        assert f"{flag} has no effect here" in err
    meta = json.loads((tmp_path / "out" / "spectral_edit_meta.json").read_text())["meta"]
    assert (meta["base_model"], meta["calib_samples"]) == (BASE[1], 4)


@pytest.mark.parametrize("command", [["edit", *LORA], ["sweep", "grid.yaml"], ["eval", *BASE, "--base_only"]])
def test_a_folder_inside_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "letter.txt").touch()
    status, _, err = run(capsys, *command, "--out_dir", tmp_path / "letter.txt" / "deep" / "out")
    assert status == 1
    assert f"{tmp_path / 'letter.txt'} is a file, and cannot hold the folder" in err


def test_a_second_weight_file_is_not_left_beside_the_edited_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(embedded.adapter_dir(), tmp_path / "source")
    torch.save(tensors(tmp_path / "source"), tmp_path / "source" / "adapter_model.bin")
    argv = ["--lora_path", tmp_path / "source", "--mode", "random_index", "--out_dir", tmp_path / "out"]
    assert run(capsys, "edit", *argv)[0] == 0
    assert not (tmp_path / "out" / "adapter_model.bin").exists()

"""`--config` and `--print_config`: a file of flags is a command line."""

from __future__ import annotations

import argparse
import os
import random
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import NAMES, OWN_CONFIG, commands, parsed, refused

from spectral_fast.cli import main
from spectral_fast.cli.parser import Parser

TEXTS = ("x", "1e-4", "012", "yes", "null", "~x", "a: b", "#", "-", "2024-01-01", "ünï", "with space", "'", '"', "{")
PROPERTY = sorted(set(NAMES) - {OWN_CONFIG})


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def printed(capsys: pytest.CaptureFixture[str], command: str, *argv: object) -> str:
    assert main([command, "--print_config", *map(str, argv)]) == 0
    return capsys.readouterr().out


def some_text(action: argparse.Action, rng: random.Random) -> str:
    """A value as a user may type it."""
    if action.choices is not None:
        return str(rng.choice(list(action.choices)))
    kind = getattr(action.type, "__name__", "str")
    texts = {"int": ("1", "2", "7", "40"), "float": ("0.5", "1e-3", "0.25", "1")}.get(kind, TEXTS)
    allowed = [text for text in texts if _is_allowed(action, text)]
    return rng.choice(allowed)


def _is_allowed(action: argparse.Action, text: str) -> bool:
    try:
        Parser()._get_value(action, text)
    except argparse.ArgumentError:
        return False
    return True


def some_command_line(name: str, rng: random.Random) -> list[str]:
    """All that must be given, and every other flag with even odds."""
    parser = commands()[name]
    flags: list[str] = []
    positionals: list[str] = []
    for key, action in parser.keys().items():
        if not action.option_strings:
            positionals.append(some_text(action, rng))
        elif key in parser.required or rng.random() < 0.5:
            flag = action.option_strings[0]
            many = action.nargs == "+"
            values = [] if action.nargs == 0 else [some_text(action, rng) for _ in range(1 + many)]
            flags += [flag, *values] if many or not values else [f"{flag}={values[0]}"]
    return [name, *flags, "--", *positionals] if positionals else [name, *flags]


@pytest.mark.parametrize("name", PROPERTY)
def test_what_print_config_prints_is_the_same_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(name)
    for _ in range(2):
        argv = some_command_line(name, rng)
        wanted = parsed(*argv)
        text = printed(capsys, *argv)
        got = parsed(name, "--config", str(write(tmp_path, text)))
        assert got == wanted
        assert printed(capsys, name, "--config", write(tmp_path, text)) == text


def test_the_defaults_in_a_printed_file_can_be_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "clip", "--lora_path", "x", "--out_dir", "y")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line and line[0] != "#"] == ["lora_path: x", "out_dir: y"]
    aloud = "\n".join(line.removeprefix("#") for line in lines if line[:2] != "# " and "NAME" not in line)
    given = parsed("clip", "--config", str(write(tmp_path, aloud.replace("DIR", "cache"))))
    assert given["multiple"] == commands()["clip"].fallbacks["multiple"]
    assert given["target_modules"] == ["all-linear"]
    assert (given["layer_max"], given["include_conv"], given["cache_dir"]) == (10**9, False, "cache")


def test_what_must_be_given_is_named_where_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "export").splitlines()
    assert [line for line in lines if line and line[0] != "#"] == []
    assert lines[lines.index("#out_dir: DIR") - 1].endswith("(required)")
    assert "#lora_path: ADAPTER" in lines
    assert "#bake_scaling: false" in lines
    assert printed(capsys, "diff").count("(required)") == 2


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "lora_path: x\nout_dir: y\nstream: true\nsmooth_align_mid: false\ncore_frac: 0.1\nmode: gd")
    said = parsed("edit", "--config", str(file))
    assert (said["stream"], said["smooth_align_mid"], said["core_frac"], said["mode"]) == (True, False, 0.1, "gd")
    words = ["--no_stream", "--smooth_align_mid", "--core_frac", "0.3", "--mode=z_score", "--out_dir", "z"]
    for argv in ([*words, "--config", str(file)], [f"--config={file}", *words]):
        said = parsed("edit", *argv)
        assert (said["stream"], said["smooth_align_mid"], said["core_frac"]) == (False, True, 0.3)
        assert (said["mode"], said["out_dir"], said["lora_path"]) == ("z_score", Path("z"), "x")


def test_positionals_and_lists_may_stand_in_the_file(tmp_path: Path) -> None:
    file = str(write(tmp_path, "first: a\nsecond: b\ntarget_modules: [q_proj, v_proj]\nlayer_max: 012"))
    said = parsed("diff", "--config", file)
    assert (said["first"], said["second"], said["target_modules"]) == ("a", "b", ["q_proj", "v_proj"])
    assert said["layer_max"] == 12
    assert (parsed("diff", "c", "--config", file)["first"], parsed("diff", "c", "--config", file)["second"]) == (
        "c",
        "b",
    )
    assert parsed("diff", "a", "b", "--config", str(write(tmp_path, "target_modules: o_proj")))["target_modules"] == [
        "o_proj"
    ]
    grid = write(tmp_path, "configs: grid.yaml\nout_dir: ~/sweep\nray: there:6379")
    said = parsed("sweep", "--config", str(grid))
    assert (said["configs"], said["out_dir"], said["ray"]) == (Path("grid.yaml"), Path.home() / "sweep", "there:6379")
    harness = write(tmp_path, "lora_dir: a\nbase_model: b\nextra: [--num_fewshot, 5]")
    assert parsed("lm-eval", "--config", str(harness))["extra"] == ["--num_fewshot", "5"]
    said = parsed("lm-eval", "--config", str(harness), "--", "--batch-size", "--config=8")
    assert said["extra"] == ["--batch-size", "--config=8"]


def test_a_file_may_hold_nothing(tmp_path: Path) -> None:
    assert parsed("info", "--config", str(write(tmp_path, "# nothing"))) == parsed("info")
    assert parsed("info", "--config", str(write(tmp_path, "json: null"))) == parsed("info")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("core_fraction: 0.3", "unknown key 'core_fraction'; is core_frac meant?"),
        ("edit_mode: gd", "unknown key 'edit_mode'; is mode meant?"),
        ("no-stream: true", "unknown key 'no-stream'; is stream meant?"),
        ("lora-path: x", "unknown key 'lora-path'; is lora_path meant?"),
        ("no_smooth_align_mid: true", "unknown key 'no_smooth_align_mid'; is smooth_align_mid meant?"),
        ("config: other.yaml", "unknown key 'config'"),
        ("core_frac: much", "core_frac: invalid float value: 'much'"),
        ("core_frac: 7", "core_frac: must be 0 to 1; got 7.0"),
        ("min_core_k: 1.5", "min_core_k: invalid int value: '1.5'"),
        ("mode: abs_selct", "mode: invalid choice: 'abs_selct'; is abs_select meant?"),
        ("stream: please", "stream: must be true or false; got 'please'"),
        ("adapter_name: yes", "adapter_name: must be one word or number, in quotes if YAML reads more; got True"),
        ("out_dir: [a, b]", "out_dir: must be one word or number"),
        ("target_modules: []", "target_modules: must have one value or more; got none"),
        ("target_modules: [a, [b]]", "target_modules: must be words and numbers"),
        ("mode: gd\nmode: gd", "key 'mode' stands there twice"),
        ("- mode", "must hold keys and values; got list"),
        ("mode: [", "is not YAML that can be read"),
        ("mode: gd", "the following arguments are required: --lora_path, --out_dir"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    file = write(tmp_path, text)
    error = refused(capsys, "edit", "--config", file)
    assert complaint in error
    assert str(file) in error or "required" in complaint


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--config: no file {tmp_path / 'absent.yaml'}" in refused(
        capsys, "edit", "--config", tmp_path / "absent.yaml"
    )
    assert "--config: expected one argument" in refused(capsys, "info", "--config")
    assert f"--config: {tmp_path} is a folder; name a file" in refused(capsys, "info", "--config", tmp_path)


def test_the_file_may_be_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("seed: 4"))
    writer.start()
    assert parsed("edit", "--lora_path=x", "--out_dir=y", "--config", str(pipe))["seed"] == 4
    writer.join()


def test_help_is_given_whatever_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["info", "--config", str(write(tmp_path, "what: 3")), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


def test_a_training_prints_the_file_that_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    from spectral_fast.training import load

    given: dict[str, Any] = {"lora_r": 8, "slora": {"enable": True, "seed": 7}, "max_length": None, "bf16": False}
    file = write(tmp_path, yaml.safe_dump({**given, "model": {"lora_target_modules": ["q_proj", "v_proj"]}}))
    words = ["--learning_rate", "1e-4", "--output_dir", str(tmp_path / "run")]
    text = printed(capsys, "train", "--config", file, *words, "--no_use_peft", "--lora_r", 4)
    lines = text.splitlines()
    assert {"lora_r: 4", "learning_rate: 0.0001", "max_length: null", "slora_seed: 7", "use_peft: false"} <= set(lines)
    assert "#max_steps: -1" in lines
    assert load(write(tmp_path, text), {}) == load(file, {"lora_r": 4, "use_peft": False}, words)
    assert yaml.safe_load(text).keys() == {
        *("lora_r", "slora_enable", "slora_seed", "max_length", "bf16", "lora_target_modules"),
        *("use_peft", "learning_rate", "output_dir"),
    }


def test_a_training_of_which_nothing_is_given_prints_a_file_that_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    text = printed(capsys, "train")
    assert [line for line in text.splitlines() if line and line[0] != "#"] == []
    assert printed(capsys, "train", "--config", write(tmp_path, text)) == text
    assert not re.search("^#(json|overwrite):", text, re.MULTILINE)  # which its file cannot hold


def test_a_wrong_training_is_a_wrong_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    file = write(tmp_path, "lora_alfa: 4")
    assert "unknown key 'lora_alfa'; is lora_alpha meant?" in refused(capsys, "train", "--config", file)
    assert "unknown flag --lora_rr; is --lora_r meant?" in refused(capsys, "train", "--output_dir=x", "--lora_rr=4")

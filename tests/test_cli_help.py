"""What a user reads of the command line itself: help, usage, refusals, and what the tab key offers."""

from __future__ import annotations

import io
import json
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from cli_tools import NAMES, commands, refused

from spectral_fast.cli import main
from spectral_fast.cli.parser import STATUSES
from spectral_fast.cli.start import command_line
from spectral_fast.evaluation.profiles import EvaluationOptions, HumanEvalOptions
from spectral_fast.policies import POLICIES


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_the_list_of_commands_has_each_in_one_line_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert max(map(len, lines)) <= 80
    for name, parser in commands().items():
        assert f"  {name:<16}  {parser.summary}" in lines
        assert 0 < len(parser.summary) <= 55
    assert lines.index("adapters:") < lines.index("evaluation:") < lines.index("this machine:")
    assert f"  {STATUSES}" in lines


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_fits_80_columns_and_has_an_example(name: str) -> None:
    lines = commands()[name].format_help().splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert any(line.startswith(f"  spectral-fast {name}") for line in lines)
    assert f"  {STATUSES}" in lines
    assert not re.search(r"\b(STR|INT|FLOAT|LORA_PATH)\b", "\n".join(lines).partition("\nexample")[0])


def test_usage_tells_what_is_needed_and_no_more() -> None:
    usage = " ".join(commands()["probe"].format_usage().split())
    assert usage == "usage: spectral-fast probe --lora_path ADAPTER --out_dir DIR --base_model MODEL [flags]"
    assert commands()["diff"].format_usage() == "usage: spectral-fast diff FIRST SECOND [flags]\n"
    assert commands()["info"].format_usage() == "usage: spectral-fast info [flags]\n"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["edti"], "spectral-fast: error: argument COMMAND: invalid choice: 'edti'; is edit meant?"),
        ([], "spectral-fast: error: the following arguments are required: COMMAND"),
        (["--json", "info"], "spectral-fast: error: the command comes first, then its flags; got --json"),
        (["info", "--jsn"], "spectral-fast info: error: unrecognized arguments: --jsn; is --json meant?"),
        (["info", "--xyz=3"], "spectral-fast info: error: unrecognized arguments: --xyz=3"),
        (["info", "more"], "spectral-fast info: error: unrecognized arguments: more"),
        (["edit", "--lora-pth", "x"], "spectral-fast edit: error: unrecognized arguments: --lora_pth; is --lora_path"),
        (["edit", "--mode", "abs"], "invalid choice: 'abs'; is abs_select meant?; choose from abs_select, smooth_abs"),
        (["edit", "--mode", "smoth_abs"], "invalid choice: 'smoth_abs'; is smooth_abs meant?"),
        (["info", "--config", ""], "argument --config: must not be empty"),
        (["resize", "--out_dir="], "argument --out_dir: must not be empty"),
        (["merge"], "the following arguments are required: --lora_path, --weights, --out_dir"),
    ],
)
def test_a_wrong_command_line_gets_the_usage_the_error_and_where_to_read_on(
    capsys: pytest.CaptureFixture[str], argv: list[str], error: str
) -> None:
    lines = refused(capsys, *argv).splitlines()
    assert lines[0].startswith("usage: spectral-fast")
    assert error in lines[-2]
    assert re.fullmatch(r"run `spectral-fast( \w+)? --help` for all (flags|commands)", lines[-1])
    assert len(lines) <= 4


def test_dataclasses_that_share_a_flag_agree_on_its_values() -> None:
    for classes in (POLICIES.values(), (EvaluationOptions, HumanEvalOptions)):
        seen: dict[str, dict[str, object]] = {}
        for f in (f for cls in classes for f in fields(cls)):
            allowed = {key: f.metadata[key] for key in ("choices", "low", "high", "positive")}
            assert seen.setdefault(f.name, allowed) == allowed, f.name


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["inspect", "--lora_path=x", "--out_dir={file}"], "--out_dir {file} is a file; name a folder for the results"),
        (["analyze", "--baseline=x", "--slora=x", "--output={folder}"], "--output {folder} is a folder; name a file"),
        (["edit", "--lora_path=x", "--out_dir=x", "--report={folder}"], "--report {folder} is a folder; name a file"),
    ],
)
def test_a_file_where_a_folder_shall_be_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], error: str
) -> None:
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    assert error.format(**places) in refused(capsys, *(word.format(**places) for word in argv))
    assert main(["bench", "--out_json", str(tmp_path / "file" / "x.json")]) == 1
    assert f"{tmp_path / 'file'} is a file, and cannot hold" in capsys.readouterr().err


def test_characters_that_the_terminal_lacks_are_told_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit) as ended:
        main(["diff", "--help"])
    terminal.seek(0)
    assert (ended.value.code, "|\\u0394W1" in terminal.read()) == (0, True)


def test_the_help_of_edit_tells_which_flags_are_for_which_mode() -> None:
    text = " ".join(commands()["edit"].format_help().split())
    assert "random_index: amp_factor, sup_factor, mid_factor, core_frac, noise_frac, min_core_k, seed gd:" in text


def test_a_tilde_after_an_equals_sign_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/ada")
    argv = ["edit", "--lora_path=~/mine", "--out_dir=~/out", "--calib_data=~/x.jsonl", "--report=~", "--mode=gd"]
    args, _ = command_line().parse_known_args(argv)
    assert (args.lora_path, args.calib_data) == ("/home/of/ada/mine", "/home/of/ada/x.jsonl")
    assert (args.out_dir, args.report) == (Path("/home/of/ada/out"), Path("/home/of/ada"))


BASH = """
source "$1"; cd "$2"; shift 2
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
$(complete -p spectral-fast | sed -E 's/.*-F ([^ ]+).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "spectral-fast.bash"
    with pytest.MonkeyPatch.context() as patch, file.open("w") as out:
        patch.setattr("sys.stdout", out)
        assert main(["completion", "bash"]) == 0
    return file


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ed"], {"edit"}),
        (["eval"], {"eval", "eval-humaneval"}),
        (["edit", "--mo"], {"--mode"}),
        (["edit", "--mode", "ab"], {"abs_select"}),
        (["edit", "--no_"], {"--no_smooth_align_mid"}),
        (["completion", "z"], {"zsh"}),
        (["edit", "--out_dir", "fo"], {"folder"}),
        (["edit", "--out_dir", r"a\ f"], {"a folder"}),
        (["edit", "--config", "fi"], {"file.yaml"}),
    ],
)
def test_bash_completes(bash_script: Path, tmp_path: Path, words: list[str], wanted: set[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a folder").mkdir()
    (tmp_path / "file.yaml").touch()
    argv = ["bash", "--norc", "-c", BASH, "-", str(bash_script), str(tmp_path), "spectral-fast", *words]
    result = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert set(result.stdout.splitlines()) == wanted


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "spectral-fast" in script
    assert "preserve_energy" in script
    assert "no_preserve_energy" not in script


def test_info_tells_of_the_environment_as_it_found_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["environment"]
    assert "TRANSFORMERS_VERBOSITY" not in told
    assert told["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"

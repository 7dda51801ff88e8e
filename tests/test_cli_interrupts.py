"""Ctrl-C and SIGTERM: an exit status that says so, nothing left behind, and what to do next."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_fast import embedded
from spectral_fast.cli import info, main

LORA = ["--lora_path", str(embedded.adapter_dir())]
EDIT = ["edit", *LORA, "--mode", "random_index"]

# An edit that waits for a signal when its new folder is half-written.
WAITING = """
import sys, time
from spectral_fast.cli import edit
def wait(modules):
    for module in modules:
        yield module
        print("waiting", flush=True)
        time.sleep(60)
edit.bar = lambda name: wait
from spectral_fast.cli import main
sys.exit(main())
"""


def signalled(tmp_path: Path, number: int) -> tuple[int, str]:
    argv = [sys.executable, "-c", WAITING, *EDIT, "--out_dir", str(tmp_path / "out")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "waiting\n"
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
        run.send_signal(number)
        _, err = run.communicate(timeout=60)
    return run.returncode, err


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_a_run_that_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, number: int, status: int, word: str
) -> None:
    returned, err = signalled(tmp_path, number)
    assert returned == status
    last = err.splitlines()[-1]
    assert last == f"spectral-fast edit: {word}; no file or folder is left half-written. Run it again."
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_and_a_training_have_their_own_ways_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectral_fast.sweep.load_configs", interrupted)
    monkeypatch.setattr("spectral_fast.training.load", interrupted)
    assert main(["sweep", "grid.yaml", "--out_dir", "sweep"]) == 130
    assert capsys.readouterr().err.endswith("The same command goes on where this one stopped.\n")
    assert main(["train"]) == 130
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_an_edit_that_is_evaluated_is_there_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectral_fast.cli.edit._evaluate_edit", interrupted)
    out, data = tmp_path / "out", str(embedded.heldout_file())
    words = ["--base_model", str(embedded.base_model_dir()), "--eval_gsm8k", "--eval_data", data, "--eval_fewshot=0"]
    assert main([*EDIT, *words, "--out_dir", str(out)]) == 130
    assert f"{out} is there already: run it again with --overwrite" in capsys.readouterr().err
    assert main([*EDIT, "--overwrite", "--out_dir", str(out)]) == 0


def test_under_torchrun_the_signal_is_left_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_fast.calibration.torchrun import ENVIRONMENT
    from spectral_fast.cli.interrupts import stoppable

    with stoppable():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "0")
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_command_within_a_program_leaves_its_handler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def look(_: object) -> tuple[dict[str, object], str]:
        seen.append(signal.getsignal(signal.SIGTERM))
        return {}, ""

    monkeypatch.setattr(info, "_run", look)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert main(["info"]) == 0
        assert seen[0] not in (signal.SIG_DFL, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.signal(signal.SIGTERM, mine := lambda *_: None)
        assert main(["info"]) == 0
        assert seen[1] is mine
    finally:
        signal.signal(signal.SIGTERM, before)

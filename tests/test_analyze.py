"""The report of a gated training beside one without a gate, from what both leave in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectral_fast.cli import main
from spectral_fast.report.gated import TrainingRecord, analyze


def leave(folder: Path, losses: list[float], accepts: list[bool] | None = None, held_out: float | None = None) -> Path:
    """What `train` leaves, of one micro-batch per step."""
    folder.mkdir()
    entries: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, start=1):
        entry = {"step": step, "loss": loss}
        if accepts is not None:
            made = {"total_steps": step, "optimizer_steps": sum(accepts[:step]), "current_novelty_threshold": 0.3}
            entry |= {f"gate/{name}": value for name, value in made.items()}
        entries.append(entry)
    if held_out is not None:
        entries.append({"step": len(losses), "eval_loss": held_out})
    entries.append({"step": len(losses), "train_runtime": 2.0, "train_loss": 1.0})
    (folder / "log_history.json").write_text(json.dumps(entries))
    if accepts is not None:
        rate = sum(accepts) / len(accepts)
        metrics = {"acceptance_rate": rate, "optimizer_steps": sum(accepts), "avg_novelty": 0.5}
        histories = {"accept_history": accepts, "novelty_history": [0.5] * len(accepts)}
        (folder / "gate_metrics.json").write_text(json.dumps(metrics | histories))
    return folder


def test_the_command_writes_a_report_with_two_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = leave(tmp_path / "all", [2.0, 1.0], held_out=1.2)
    gated = leave(tmp_path / "gated", [2.0, 1.5, 1.3], [True, False, True], held_out=1.203)
    output = tmp_path / "reports" / "analysis.md"
    words = ["analyze", "--baseline", str(baseline), "--slora", str(gated), "--output", str(output)]
    assert main(words) == 0
    assert "success: loss on held-out data +0.25% against the baseline, 33.3% of micro" in capsys.readouterr().out
    text = output.read_text()
    assert "| loss on held-out data | 1.2000 | 1.2030 |" in text
    assert "| steps of the optimizer | 2 | 2 |" in text
    assert "| micro-batches accepted | 100.0% | 66.7% |" in text
    pictures = sorted(file.name for file in output.parent.iterdir() if file.suffix == ".png")
    assert pictures == ["analysis-gate.png", "analysis-loss.png"]
    assert all(f"]({name})" in text for name in pictures)
    assert main(words) == 1
    assert "is there already: --overwrite it" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["success"]


@pytest.mark.parametrize(
    ("loss", "accepts", "success"),
    [
        (1.004, [True, False], True),
        (0.996, [True, False], True),
        (1.006, [True, False], False),
        (1.0, [True] * 2, False),
    ],
)
def test_success_is_an_equal_loss_with_a_third_rejected(
    tmp_path: Path, loss: float, accepts: list[bool], success: bool
) -> None:
    baseline = leave(tmp_path / "all", [2.0, 1.0], held_out=5.0)
    gated = leave(tmp_path / "gated", [2.0, loss], accepts)
    result = analyze(baseline, gated, tmp_path / "report.md")
    assert (result["compared"], result["success"]) == ("final_loss", success)
    assert result["difference"] == pytest.approx(loss - 1)


def test_a_trainers_own_folder_is_read_from_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = leave(tmp_path / "all", [2.0, 1.0])
    entries = json.loads((folder / "log_history.json").read_text())
    (folder / "log_history.json").unlink()
    for step in (9, 10):
        (folder / f"checkpoint-{step}").mkdir()
        state = {"log_history": [*entries, {"step": step, "loss": step / 10}]}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert TrainingRecord.read(folder).last("loss") == 1.0
    assert TrainingRecord.read(folder).facts()["steps"] == 10


def test_steps_of_the_optimizer_are_told_from_those_of_the_log(tmp_path: Path) -> None:
    record = TrainingRecord.read(leave(tmp_path / "gated", [1.0] * 4, [True, False, False, True]))
    assert record.optimizer_steps(record.curve("loss")[0]).tolist() == [1, 1, 1, 2]


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    baseline, gated = leave(tmp_path / "all", [1.0]), leave(tmp_path / "gated", [1.0], [True])
    out, empty = tmp_path / "report.md", leave(tmp_path / "empty", [])
    with pytest.raises(FileNotFoundError, match="a training leaves a folder; there is none"):
        analyze(tmp_path / "absent", gated, out)
    with pytest.raises(ValueError, match="is of no gated training: it has no gate_metrics"):
        analyze(baseline, baseline, out)
    with pytest.raises(ValueError, match="the baseline has no gate"):
        analyze(gated, gated, out)
    with pytest.raises(ValueError, match="holds no training loss: train longer than logging_steps"):
        analyze(empty, gated, out)
    with pytest.raises(FileExistsError, match="is a folder; name a file"):
        analyze(baseline, gated, tmp_path)
    (gated / "gate_metrics.json").write_text('{"acceptance_rate": 1.0}')
    with pytest.raises(ValueError, match=r"gate_metrics\.json must have acceptance_rate and accept_history"):
        analyze(baseline, gated, out)
    (baseline / "log_history.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds no training loss"):
        analyze(baseline, gated, out)
    (baseline / "log_history.json").write_text("{")
    with pytest.raises(ValueError, match=r"log_history\.json is no JSON"):
        analyze(baseline, gated, out)
    (baseline / "log_history.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no log_history\.json, nor a checkpoint"):
        analyze(baseline, gated, out)
    assert not out.exists()

"""Sweeps in which something fails: the rest goes on, what failed is named, and tried again by the next start."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sweep_tools import FakeEngine, sweep, tables, write_configs

from spectral_fast import atomic, embedded
from spectral_fast.evaluation.comparison import holm
from spectral_fast.sweep import work
from spectral_fast.sweep.ledger import LEDGER

LINES = [{"edit_mode": "abs_select", "amp_factor": [1.1, 1.2]}, {"edit_mode": "gd"}]


class FailingEngine(FakeEngine):
    """Fails by `error` when it is given the adapter with this amp_factor, None for the original."""

    amp_factor: ClassVar[float | None] = 1.2
    error: ClassVar[Exception] = RuntimeError("the engine is dead")

    def generate(self, prompts: Sequence[str], sampling: Any, adapters: Sequence[Path], **_: Any) -> list[list[str]]:
        for folder in set(adapters):
            edited = folder / "spectral_edit_meta.json"
            meta = json.loads(edited.read_text())["meta"] if edited.exists() else {"amp_factor": None}
            if meta.get("amp_factor", 0) == self.amp_factor:
                raise self.error
        return super().generate(prompts, sampling, adapters)


def by_label(result: dict) -> dict[str, dict]:
    return {run["label"]: run for run in result["runs"]}


def test_an_edit_that_overflows_is_a_failure_of_its_own(tmp_path: Path) -> None:
    lines = [{"edit_mode": "abs_select", "amp_factor": [1.1, 1e200], "notes": "n"}, {"edit_mode": "gd"}]
    result = sweep(write_configs(tmp_path, lines), tmp_path / "out", controls=0)
    [failure] = result["failures"]
    assert failure["label"] == "abs_select, amp_factor 1e+200"
    assert failure["where"] == "configs.jsonl line 1"
    assert "pushes s' beyond 1e+150" in failure["error"]
    runs = by_label(result)
    assert list(runs) == ["original", "abs_select, amp_factor 1.1", "gd"]
    # Three variants were to be compared, so Holm counts three, although the third has no p-value.
    p_values = [runs[label]["comparison"]["p_value"] for label in ("abs_select, amp_factor 1.1", "gd")]
    assert [runs[label]["p_holm"] for label in list(runs)[1:]] == holm([*p_values, 1.0])[:2]
    line = result["lines"][1]
    assert (line["pass@1"], line["verdict"], line["run"]) == (None, "failed", failure["run"])
    for name in ("summary_table.md", "report.html"):
        assert "s&#x27; beyond" in (text := (tmp_path / "out" / name).read_text()) or "s' beyond" in text
        assert "1 of 4 runs failed" in text
    assert not list((tmp_path / "out").rglob(".*"))


def test_what_failed_is_tried_again_and_nothing_else(tmp_path: Path) -> None:
    configs = write_configs(tmp_path, LINES)
    expected = sweep(configs, tmp_path / "undisturbed", controls=1)
    result = sweep(configs, tmp_path / "out", controls=1, engine=FailingEngine)
    assert [failure["label"] for failure in result["failures"]] == [
        "abs_select, amp_factor 1.2",
        "random_index, amp_factor 1.2",
    ]
    assert {failure["error"] for failure in result["failures"]} == {"the engine is dead"}
    assert len(result["runs"]) == len(expected["runs"]) - 2
    again = sweep(configs, tmp_path / "out", controls=1, engine=FailingEngine)
    assert again == result
    calls = len(FakeEngine.calls)
    assert sweep(configs, tmp_path / "out", controls=1)["failures"] == []
    assert FakeEngine.calls[calls:] == [2]
    assert tables(tmp_path / "out") == tables(tmp_path / "undisturbed")


def test_without_the_original_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingEngine, "amp_factor", None)
    result = sweep(write_configs(tmp_path, LINES), tmp_path / "out", controls=1, engine=FailingEngine)
    assert [failure["label"] for failure in result["failures"]] == ["original"]
    verdicts = {run["verdict"] for run in result["runs"] if run["role"] == "variant"}
    assert verdicts == {"not compared, as the original failed"}
    assert {run["p_holm"] for run in result["runs"]} == {None}


def test_everything_can_fail(tmp_path: Path) -> None:
    result = sweep(write_configs(tmp_path, LINES[1:]), tmp_path / "out", controls=0, engine=_Dead)
    assert (result["runs"], len(result["failures"])) == ([], 2)
    assert (tmp_path / "out" / "report.html").is_file()


class _Dead(FakeEngine):
    def generate(self, *_: Any, **__: Any) -> list[list[str]]:
        raise AssertionError


def test_a_probe_that_fails_takes_its_own_variants_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = work.probe

    def probe(adapter: Any, modules: Any, base: str, options: Any, models: Any) -> Any:
        if options.calib_samples == 3:
            raise RuntimeError("CUDA out of memory")
        return measured(adapter, modules, base, options, models)

    monkeypatch.setattr(work, "probe", probe)
    lines = [{"edit_mode": "abs_select", "calib_samples": [2, 3]}]
    result = sweep(write_configs(tmp_path, lines), tmp_path / "out", controls=1)
    [failure] = result["failures"]
    assert failure["error"] == "its probe failed: CUDA out of memory"
    assert [run["role"] for run in result["runs"]] == ["baseline", "variant", "control"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interrupt_are_no_failure_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    configs = write_configs(tmp_path, LINES)
    monkeypatch.setattr(FailingEngine, "error", error)
    with pytest.raises(type(error)):
        sweep(configs, tmp_path / "out", group=1, controls=0, engine=FailingEngine)
    entries = [json.loads(line) for line in (tmp_path / "out" / LEDGER).read_text().splitlines()]
    assert [(len(entry["runs"]), entry["failures"]) for entry in entries] == [(1, []), (1, [])]
    assert not list((tmp_path / "out").rglob(".*"))
    assert sweep(configs, tmp_path / "out", group=1, controls=0)["failures"] == []


def test_an_adapter_that_changes_meanwhile_ends_the_sweep(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    configs = write_configs(tmp_path, [{"edit_mode": "abs_select", "lora_local_path": str(adapter)}])
    shutil.copytree(embedded.adapter_dir(), adapter)

    class Changing(FakeEngine):
        def generate(self, *arguments: Any, **options: Any) -> list[list[str]]:
            texts = super().generate(*arguments, **options)
            (adapter / "adapter_model.safetensors").touch()
            return texts

    with pytest.raises(OSError, match="was changed while the sweep ran"):
        sweep(configs, tmp_path / "out", group=1, controls=0, engine=Changing)


def test_what_someone_removed_is_made_again(tmp_path: Path) -> None:
    configs, out = write_configs(tmp_path, [{"edit_mode": "gd", "keep_adapter": True}]), tmp_path / "out"
    result = sweep(configs, out, controls=0)
    expected = tables(out)
    variant = result["runs"][1]["run"]
    shutil.rmtree(out / "runs" / variant / "adapter")
    sweep(configs, out, controls=0)
    assert (out / "runs" / variant / "adapter" / "adapter_config.json").is_file()
    shutil.rmtree(out / "runs")
    shutil.rmtree(out / "probes")
    sweep(configs, out, controls=0)
    assert tables(out) == expected
    shutil.rmtree(out / "probes")
    sweep(configs, out, controls=0)
    assert "singular values before and after" not in (out / "report.html").read_text()


def test_what_the_ledger_lacks_is_made_again_where_folders_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, out = write_configs(tmp_path, LINES), tmp_path / "out"
    sweep(configs, out, controls=1)
    expected, ledger = tables(out), out / LEDGER
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0])  # killed when the folders of the second group were there

    def refuse(*_: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(atomic, "_exchange", refuse)
    assert sweep(configs, out, controls=1)["failures"] == []
    assert tables(out) == expected


def test_tables_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has results.json and no ledger.jsonl, so it is no sweep's"):
        sweep(write_configs(tmp_path, LINES[1:]), tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_text() == "mine"


def test_half_written_tables_of_a_killed_sweep_are_removed(tmp_path: Path) -> None:
    configs, out = write_configs(tmp_path, [{"edit_mode": "baseline"}]), tmp_path / "out"
    sweep(configs, out)
    (out / ".report.html.123.partial").write_text("half")
    (out / ".other.partial").write_text("not ours")
    sweep(configs, out)
    assert [path.name for path in out.rglob(".*")] == [".other.partial"]

"""Calibration in rounds, which stop when the choice of directions is stable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama, with_lora

from spectral_fast import embedded
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.data import Example
from spectral_fast.calibration.probe import CalibrationOptions
from spectral_fast.calibration.rounds import as_text, in_rounds
from spectral_fast.cli import main
from spectral_fast.sensitivity import Sensitivity
from spectral_fast.statistics import doubling


class Samples:
    """Random g per sample of two modules around a mean, and which of them were asked for."""

    def __init__(self, count: int, signal: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.g = {
            name: signal * torch.randn(r, generator=generator) + torch.randn(count, r, generator=generator)
            for name, r in (("a", 64), ("b", 40))
        }
        self.asked: list[range] = []

    def measure(self, part: range) -> dict[str, torch.Tensor]:
        self.asked.append(part)
        return {name: g[part.start : part.stop] for name, g in self.g.items()}


@pytest.mark.parametrize(
    ("count", "batch_size", "ends"),
    [
        (60, 2, [8, 10, 14, 18, 24, 30, 38, 48, 60]),
        (50, 2, [8, 10, 14, 18, 24, 30, 38, 48, 50]),
        (20, 1, [8, 10, 13, 17, 20]),
        (40, 3, [9, 12, 15, 21, 27, 36, 40]),
        (40, 16, [16, 32, 40]),
        (5, 2, [5]),
    ],
)
def test_rounds_grow_by_a_quarter_in_whole_batches(count: int, batch_size: int, ends: list[int]) -> None:
    samples = Samples(count, 0.0)
    rows, record = in_rounds(samples.measure, count, batch_size, 1.0)
    assert [part.stop for part in samples.asked] == ends
    assert [part.start for part in samples.asked] == [0, *ends[:-1]]
    assert [check["samples"] for check in record["checks"]] == ends
    assert not record["stable"]
    assert record["samples_used"] == count
    assert all(torch.equal(rows[name], g) for name, g in samples.g.items())


def test_without_until_stable_there_is_one_round_and_no_check() -> None:
    samples = Samples(50, 9.0)
    rows, record = in_rounds(samples.measure, 50, 2, 0.0)
    assert samples.asked == [range(50)]
    assert record == {"samples_used": 50}
    assert torch.equal(rows["a"], samples.g["a"])


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_it_stops_at_the_first_check_that_reaches_the_share(threshold: float) -> None:
    samples = Samples(400, 1.0)
    rows, record = in_rounds(samples.measure, 400, 2, threshold)
    used = record["samples_used"]
    assert record["stable"]
    assert 8 <= used < 400
    assert all(torch.equal(rows[name], g[:used]) for name, g in samples.g.items())
    agreements = [check["agreement"] for check in record["checks"]]
    assert agreements == [
        doubling({name: g[: check["samples"]] for name, g in samples.g.items()}) for check in record["checks"]
    ]
    assert agreements[-1] >= threshold > max([0.0, *agreements[:-1]])


def test_a_single_sample_is_never_stable() -> None:
    _, record = in_rounds(Samples(1, 9.0).measure, 1, 2, 0.5)
    assert record == {"samples_used": 1, "stable": False, "checks": []}
    assert as_text({**record, "until_stable": 0.5}).startswith("warning: 1 sample cannot show")


def test_the_line_says_whether_it_became_stable() -> None:
    checks = [{"samples": 8, "agreement": 0.5}, {"samples": 10, "agreement": 0.8125}]
    record = {"samples_used": 10, "until_stable": 0.8, "checks": checks, "stable": True}
    assert as_text(record) == "stable after 10 samples: doubling them left 81.2% of the choice as it was, 80.0% wanted"
    assert as_text({**record, "stable": False}).startswith("warning: not stable with all 10 samples")


def test_a_calibration_that_stopped_is_that_of_the_samples_it_used() -> None:
    model = with_lora(tiny_llama())
    generator = torch.Generator().manual_seed(1)
    few = [
        Example.continuation(torch.randint(0, 97, (int(length),), generator=generator).tolist(), 2)
        for length in torch.randint(4, 20, (5,), generator=generator)
    ]
    examples = (9 * few)[:41]  # the same again and again: more of them change little
    stopped = calibrate(model, "default", examples, batch_size=3, until_stable=0.9)
    used = stopped.record["samples_used"]
    assert stopped.record["stable"]
    assert 8 <= used < 41
    assert used % 3 == 0
    plain = calibrate(model, "default", examples[:used], batch_size=3)
    assert plain.record == {"samples_used": used}
    for name, module in plain.modules.items():
        # The same numbers but for which samples share a pass: rounding of float32.
        assert float((stopped.modules[name].g - module.g).norm() / module.g.norm()) <= 1e-5


def test_limits_of_the_options() -> None:
    assert CalibrationOptions().limit == 32
    assert CalibrationOptions(until_stable=0.9).limit is None
    assert CalibrationOptions(until_stable=0.9, calib_samples=64).limit == 64
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="until_stable must be 0 to 1"):
            CalibrationOptions(until_stable=wrong)
    with pytest.raises(TypeError, match="calib_samples must be int; got 'all'"):
        CalibrationOptions(calib_samples="all")  # type: ignore[arg-type]


BASE = ["--base_model", str(embedded.base_model_dir()), "--lora_path", str(embedded.adapter_dir())]
DATA = ["--calib_data", str(embedded.calibration_file())]


def probed(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["probe", *BASE, *DATA, *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_probe_tells_how_many_samples_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = probed(capsys, "--until_stable", 0.5, "--out_dir", tmp_path / "probed", "--json")
    record = json.loads(out)
    used = record["samples_used"]
    assert (record["stable"], record["until_stable"], record["calib_samples"]) == (True, 0.5, None)
    assert [check["samples"] for check in record["checks"]] == [8, 10, 14, 18, 24, 30, 38][: len(record["checks"])]
    assert record["checks"][-1]["samples"] == used
    assert record["stability"]["samples"] == used
    assert record["stability"]["agreement"][-1]["doubling"] == record["checks"][-1]["agreement"]
    plain = json.loads(probed(capsys, "--calib_samples", used, "--out_dir", tmp_path / "plain", "--json"))
    for same in ("calib_tokens_sha256", "labels", "tokens", "samples_used"):
        assert plain[same] == record[same]
    one, other = Sensitivity.load(tmp_path / "probed"), Sensitivity.load(tmp_path / "plain")
    for name, module in one.modules.items():
        assert float((module.g - other.modules[name].g).norm() / module.g.norm()) <= 1e-5


def test_data_that_run_out_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--until-stable", 1, "--calib_samples", 9, "--out_dir", tmp_path / "probed"]
    lines = probed(capsys, *argv).splitlines()
    assert lines[0].startswith("probed 8 modules on 9 samples")
    assert lines[1].startswith("warning: not stable with all 9 samples")
    assert lines[2].startswith("core directions certain (bootstrap > 0.95): ")


def test_an_edit_in_one_go_says_so_too_and_draws_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--until_stable", "1", "--calib_samples", "9", "--out_dir", str(tmp_path / "out")]
    assert main(["edit", *BASE, *DATA, *argv, "--report", str(tmp_path / "report.html")]) == 0
    assert "warning: not stable with all 9 samples" in capsys.readouterr().out
    assert "Were the samples enough?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_rounds_and_streaming_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--until_stable", "0.9", "--stream", "--out_dir", str(tmp_path / "out")]
    assert main(["probe", *BASE, *DATA, *argv]) == 1
    assert "--until_stable 0.9 takes samples in rounds, but --stream" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

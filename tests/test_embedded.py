"""The embedded default: its problems, tokenizer, model and adapter."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest
import torch

from spectral_fast import embedded
from spectral_fast.embedded.problems import ONE_STEP, TWO_STEP, Problem, stream

ANNOTATION = re.compile(r"(\d+)([-+*/])(\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


def read(path: Path) -> list[Problem]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def calculations(problem: Problem) -> tuple[str, ...]:
    return tuple(re.findall(r"<<(.*?)>>", problem["answer"]))


def story(problem: Problem) -> str:
    """The answer without names and things: it tells the story's parts and numbers."""
    unnamed = re.sub(r"^(?!Each|Together)[A-Z][a-z]+", "", problem["answer"], flags=re.MULTILINE)
    return re.sub(r"(>>\d+) [a-z]+", r"\1", unnamed)


def check_arithmetic(problem: Problem, steps: int) -> None:
    *lines, last = problem["answer"].split("\n")
    assert len(lines) == steps
    results = []
    for line in lines:
        (left, sign, right, *repeated, result, shown), *more = ANNOTATION.findall(line)
        assert not more
        assert repeated == [left, sign, right]
        assert shown == result
        x, y = Fraction(left), Fraction(right)
        expected = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign]
        assert expected == Fraction(result)
        assert expected > 0
        results.append(result)
        for operand in (left, right):  # a calculation uses what the question or an earlier line says
            assert re.search(rf"\b{operand}\b", problem["question"]) or operand in results[:-1]
    assert last == f"#### {results[-1]}"


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_calculation_of_a_generated_answer_is_right(steps: int, held_out: bool) -> None:
    for problem in islice(stream(steps, seed=11, held_out=held_out), 1000):
        check_arithmetic(problem, steps)
        assert len(problem["question"]) <= 140
        assert len(problem["answer"]) <= 105
        assert not re.search(r"[{}]|  ", problem["question"] + problem["answer"])


def test_the_generator_repeats_itself_for_a_seed_and_not_for_another() -> None:
    first, again, other = (list(islice(stream(2, seed=s, held_out=False), 50)) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_prefix_of_the_stream_is_the_same_on_every_machine() -> None:
    assert next(stream(2, seed=0, held_out=False)) == {
        "question": "Grace picks 27 coins. Carl has 17 more coins than Grace. How many coins do they have together?",
        "answer": "Carl has 27+17 = <<27+17=44>>44 coins.\nTogether they have 27+44 = <<27+44=71>>71 coins.\n#### 71",
    }


def test_the_stories_are_varied() -> None:
    problems = list(islice(stream(2, seed=5, held_out=False), 2000))
    assert len({problem["question"] for problem in problems}) > 1990
    assert len({calculations(problem) for problem in problems}) > 1000
    assert len(set(ONE_STEP)) == len(ONE_STEP)
    assert len(set(TWO_STEP)) == len(TWO_STEP)


def test_no_other_number_of_steps_is_offered() -> None:
    with pytest.raises(ValueError, match="must be 1 or 2; got 3"):
        next(stream(3, seed=0, held_out=False))


def test_held_out_problems_are_not_training_problems_under_other_names() -> None:
    held_out, training = (list(islice(stream(2, seed=7, held_out=h), 4000)) for h in (True, False))
    assert not {story(p) for p in held_out} & {story(p) for p in training}


def test_the_shipped_problems_are_right_distinct_and_disjoint() -> None:
    calibration, held_out = read(embedded.calibration_file()), read(embedded.heldout_file())
    assert len(calibration) == 256
    assert len(held_out) == 512
    for problem in calibration + held_out:
        assert set(problem) == {"question", "answer"}
        check_arithmetic(problem, 2)
    questions = {problem["question"] for problem in calibration + held_out}
    assert len(questions) == 256 + 512
    assert not {story(p) for p in calibration} & {story(p) for p in held_out}


def test_the_shipped_files_come_from_the_generator_of_seed_0() -> None:
    # make.py stops the adapter's training by the first 256 held-out problems and ships the next 512.
    assert read(embedded.heldout_file()) == list(islice(stream(2, seed=2, held_out=True), 256, 768))
    assert read(embedded.calibration_file()) == list(islice(stream(2, seed=3, held_out=False), 256))


def test_the_assets_fit_in_8_megabytes_and_name_no_machine() -> None:
    assets = embedded.base_model_dir().parent
    present = [path for path in assets.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in present) <= 8_000_000
    config = json.loads((embedded.adapter_dir() / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "spectral_fast/embedded/assets/base_model"
    for path in present:
        if path.suffix != ".safetensors":
            assert not re.search(r'"/\w', path.read_text()), path


def test_the_tokenizer_gives_every_printable_character_back() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.base_model_dir())
    text = "".join(map(chr, range(32, 127))) + "\n\tdef f(x):\n\t\treturn  x , y .  n't   \n\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)  # one token per character, no BOS, no EOS
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.bos_token is None


def test_the_adapter_solves_two_step_problems_that_the_base_model_cannot() -> None:
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spectral_fast.embedded.make import accuracy

    tokenizer = AutoTokenizer.from_pretrained(embedded.base_model_dir())
    base = AutoModelForCausalLM.from_pretrained(embedded.base_model_dir(), dtype=torch.float32)
    problems = read(embedded.heldout_file())[:32]
    one_step = list(islice(stream(1, seed=1, held_out=True), 32))
    assert accuracy(base, tokenizer, one_step) >= 0.75
    assert accuracy(base, tokenizer, problems) <= 0.10
    adapted = PeftModel.from_pretrained(base, embedded.adapter_dir())
    # The shipped accuracy lies between 60 and 90 %: 32 problems have a standard error of at most 9 points.
    assert accuracy(adapted, tokenizer, problems) >= 0.35

"""Calibration samples with the lengths of real ones: GSM8K's first training problems, or texts as long as they are.

No tokenizer can be downloaded here, so one is trained on the samples' own kind of text, as near to Llama's as lengths
need: byte-level pairs with every digit on its own, and so many of them that a problem with its answer takes 200 tokens.
"""

from __future__ import annotations

import json
import random
from typing import Any

from benchmarks.cases import GSM8K
from spectral_fast.calibration.data import Example, encode_question_answer

PAIRS = 4000  # vocabulary: 2.7 characters per token; 8000 give 2.8, 1000 give 2.3
TRAINED_ON = 2000  # problems: half a second


def problems(count: int) -> list[dict[str, str]]:
    """The first problems of the train split, question and answer; random words where the data set is not there."""
    file = GSM8K / "train.jsonl"
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    # Characters of questions and answers are about log-normal: medians 220 and 260, logarithms spread by 0.43 and 0.5.
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu0123456789", k=rng.randint(1, 9))) for _ in range(3000)]
    return [
        {"question": _text(rng, words, 220, 0.43), "answer": _text(rng, words, 260, 0.5)}
        for _ in range(max(count, TRAINED_ON))
    ][:count]


def _text(rng: random.Random, words: list[str], characters: float, spread: float) -> str:
    length = int(characters * rng.lognormvariate(0, spread))
    return " ".join(rng.choices(words, k=length // 2))[:length]


def tokenizer() -> Any:
    """A tokenizer for transformers, the same on every call."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PAIRS, show_progress=False, special_tokens=["</s>"], initial_alphabet=alphabet
    )
    pairs.train_from_iterator((f"{x['question']}\n{x['answer']}" for x in problems(TRAINED_ON)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="</s>", clean_up_tokenization_spaces=False)


def examples(count: int) -> list[Example]:
    """The first problems as calibration samples."""
    pairs = tokenizer()
    return [encode_question_answer(pairs, x["question"], x["answer"]) for x in problems(count)]

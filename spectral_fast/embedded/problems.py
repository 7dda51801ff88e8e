"""Seeded generator of small word problems in GSM8K's format.

A problem is a story of one or two calculations. Its answer shows each calculation on a line of its own, with
GSM8K's calculator annotation, and ends with the result:

    Question: Tom has 9 apples. He buys 6 more apples. How many apples does Tom have now?
    Answer: Tom then has 9+6 = <<9+6=15>>15 apples.
    #### 15

A story is a chain of parts (``have`` -> ``gain`` -> ``share``); every part but ``have`` and ``price`` adds
one calculation. One problem in eight is held out, and the rule looks at the parts and their numbers only, so
that a held-out problem never differs from a training problem by names and things alone.
"""

# ruff: noqa: SIM905 (word lists are easier to read as text)

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["ONE_STEP", "TWO_STEP", "Problem", "stream"]

_LARGEST = 99  # of every number in a story except a banknote

Problem = dict[str, str]  # the two fields of a GSM8K row: question, answer


@dataclass(frozen=True)
class Part:
    """A sentence of the story, the calculation it asks for, and the question that ends a story here.

    ``left`` and ``right`` choose the operands from ``start`` (the story's first number), ``value`` (the last
    result) and ``n`` (this part's own number).
    """

    sentences: tuple[str, ...]
    question: str = ""
    line: str = ""
    sign: str = ""
    left: str = "value"
    right: str = "n"
    numbers: tuple[int, ...] = tuple(range(2, 21))


_FACTORS = tuple(range(2, 13))
_NOW = "How many {things} does {name} have now?"
_OTHER = "How many {things} does {other} have?"
_PAYS = "How much does {he} pay?"
_CHANGE = "How much change does {he} get?"

_STARTS = {
    "have": Part(
        ("{name} has {n} {things}.", "{name} picks {n} {things}.", "{name} owns {n} {things}."),
        numbers=tuple(range(2, 41)),
    ),
    "price": Part(("{name} buys a {item} for ${n}.", "{name} orders a {item} for ${n}."), numbers=tuple(range(2, 41))),
    "boxes": Part(
        (
            "{name} has {start} {boxes} with {n} {things} in each.",
            "{name} fills {start} {boxes} with {n} {things} each.",
        ),
        "How many {things} does {name} have?",
        "{name} has {calculation} {things}.",
        "*",
        numbers=_FACTORS,
    ),
    "cost": Part(
        ("{name} buys {start} {things} for ${n} each.", "{name} orders {start} {things} at ${n} each."),
        _PAYS,
        "{name} pays {calculation} dollars.",
        "*",
        numbers=_FACTORS,
    ),
}
_NEXT = {
    "gain": Part(
        (
            "{He} buys {n} more {things}.",
            "{He} finds {n} more {things}.",
            "{other} gives {him} {n} {things}.",
        ),
        _NOW,
        "{name} then has {calculation} {things}.",
        "+",
    ),
    "lose": Part(
        ("{He} gives {n} {things} to {other}.", "{He} loses {n} {things}.", "{He} sells {n} {things}."),
        _NOW,
        "{name} has {calculation} {things} left.",
        "-",
    ),
    "share": Part(
        ("{He} shares them equally among {n} friends.", "{n} friends split them equally."),
        "How many {things} does each friend get?",
        "Each friend gets {calculation} {things}.",
        "/",
        numbers=_FACTORS,
    ),
    "pack": Part(
        ("{He} packs them in bags of {n}.", "{He} puts {n} {things} in each bag."),
        "How many bags does {he} fill?",
        "{name} fills {calculation} bags.",
        "/",
        numbers=_FACTORS,
    ),
    "more": Part(("{other} has {n} more {things} than {name}.",), _OTHER, "{other} has {calculation} {things}.", "+"),
    "fewer": Part(("{other} has {n} fewer {things} than {name}.",), _OTHER, "{other} has {calculation} {things}.", "-"),
    "times": Part(
        ("{other} has {n} times as many {things} as {name}.",),
        _OTHER,
        "{other} has {calculation} {things}.",
        "*",
        numbers=_FACTORS,
    ),
    "and": Part(
        ("{other} has {n} {things}.",),
        "How many {things} do they have together?",
        "Together they have {calculation} {things}.",
        "+",
    ),
    "together": Part(
        ("",),
        "How many {things} do they have together?",
        "Together they have {calculation} {things}.",
        "+",
        left="start",
        right="value",
    ),
    "also": Part(("{He} also buys a {item} for ${n}.",), _PAYS, "{name} pays {calculation} dollars in all.", "+"),
    "change": Part(
        ("{He} pays with ${n}.", "{He} hands over ${n}."),
        _CHANGE,
        "{name} gets {calculation} dollars back.",
        "-",
        left="n",
        right="value",
        numbers=(20, 50, 100),
    ),
}
_PARTS = {**_STARTS, **_NEXT}
_SIGNS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}

ONE_STEP = (
    *(("have", part) for part in ("gain", "lose", "share", "pack", "more", "fewer", "times", "and")),
    *(("boxes",), ("cost",), ("price", "also"), ("price", "change")),
)
TWO_STEP = (
    *(("have", first, then) for first in ("gain", "lose") for then in ("gain", "lose", "share", "pack")),
    *(("boxes", then) for then in ("gain", "lose", "share", "pack")),
    *(("have", first, "together") for first in ("more", "fewer", "times")),
    *(("cost", then) for then in ("also", "change")),
)

_HE = (
    "Adam Ben Carl David Eric Frank George Henry Ivan Jack Kevin Leo Mark Noah Oscar Paul Ryan Sam Tom Victor"
).split()
_SHE = (
    "Anna Beth Clara Diana Emma Fiona Grace Helen Iris Julia Kate Laura Mia Nina Olivia Rosa Sara Tina Vera Wendy"
).split()
_THINGS = (
    "apples balls beads books buttons candles cards carrots coins cookies cups eggs flowers grapes keys "
    "lemons marbles muffins nuts oranges peaches pears pencils pens plums shells stamps stickers stones "
    "toys tulips"
).split()
_BOXES = "bags baskets bowls boxes buckets cartons crates jars sacks trays".split()
_ITEMS = "bell book cake clock game hat kite lamp map pan pie pizza radio scarf shirt tent".split()


def stream(steps: int, *, seed: int, held_out: bool) -> Iterator[Problem]:
    """Yield random problems without end.

    Args:
        steps: calculations per problem, 1 or 2.
        seed: of the generator; the same seed yields the same problems on every machine.
        held_out: yield the held-out eighth of all problems, or the other seven.

    Yields:
        Problems of which no held-out one shares its parts and numbers with one that is not.

    Raises:
        ValueError: if ``steps`` is neither 1 nor 2.
    """
    if steps not in (1, 2):
        raise ValueError(f"steps must be 1 or 2; got {steps}; a story has one or two calculations")
    stories = ONE_STEP if steps == 1 else TWO_STEP
    rng = random.Random(seed)
    while True:
        story = rng.choice(stories)
        while (drawn := _draw(rng, story)) is None:
            pass
        if drawn[0] is held_out:
            yield drawn[1]


def _draw(rng: random.Random, story: tuple[str, ...]) -> tuple[bool, Problem] | None:
    """Draw one problem and whether it is held out; None where its numbers do not work out."""
    name, other = rng.sample(_HE + _SHE, 2)
    he, him = ("he", "him") if name in _HE else ("she", "her")
    words = {"name": name, "other": other, "he": he, "He": he.capitalize(), "him": him}
    words |= {"things": rng.choice(_THINGS), "boxes": rng.choice(_BOXES), "item": rng.choice(_ITEMS)}

    start = value = rng.choice(_FACTORS) if _PARTS[story[0]].sign else 0
    sentences, lines, calculations = [], [], []
    for kind in story:
        part = _PARTS[kind]
        n = rng.choice(part.numbers)
        if part.sign:
            operands = {"start": start, "value": value, "n": n}
            left, right = operands[part.left], operands[part.right]
            value = _SIGNS[part.sign](left, right)
            if not 1 <= value <= _LARGEST or (part.sign == "/" and value * right != left):
                return None
            calculation = f"{left}{part.sign}{right}"
            calculations.append(calculation)
            annotated = f"{calculation} = <<{calculation}={value}>>{value}"
            lines.append(part.line.format(**words, calculation=annotated))
        else:
            start = value = n
        sentences.append(rng.choice(part.sentences).format(**words, start=start, n=n))
    sentences.append(_PARTS[story[-1]].question.format(**words))

    key = " ".join((*story, *calculations))
    held_out = hashlib.sha256(key.encode()).digest()[0] < 32
    question = " ".join(sentence for sentence in sentences if sentence)
    return held_out, {"question": question, "answer": "\n".join([*lines, f"#### {value}"])}

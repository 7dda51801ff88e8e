"""The reference is what the parser says, examples parse, and commands write what they say that they write."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from documentation_world import entered
from example_runs import Run, run_examples

from spectral_fast.calibration.torchrun import ENVIRONMENT
from spectral_fast.cli.common import broken
from spectral_fast.cli.parser import STATUSES, Parser
from spectral_fast.cli.start import command_line
from spectral_fast.environment import VARIABLES, describe

ROOT = Path(__file__).parents[1]
[COMMANDS] = [a.choices for a in command_line()._actions if isinstance(a, argparse._SubParsersAction)]
EXAMPLES = [(name, example) for name, parser in COMMANDS.items() for example in parser.examples]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_make_reference_makes() -> None:
    made = generator()
    for name, content in made.pages().items():
        assert (made.REFERENCE / name).read_text(encoding="utf-8") == content, f"{name} is old: make reference"
    assert set(re.findall(r"\d+", STATUSES)) <= set(made.STATUSES)


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_an_example_is_a_command_line(name: str, example: str) -> None:
    words = shlex.split(example.partition(" > ")[0])
    start = next(i for i, word in enumerate(words) if word in ("spectral-fast", "spectral_fast"))
    assert words[start + 1] == name
    _, rest = COMMANDS[name].parse_known_args(words[start + 2 :])
    assert not rest or COMMANDS[name].takes_more
    lines = broken(example).splitlines()
    assert max(map(len, lines)) <= 76
    assert shlex.split(" ".join(line.removesuffix("\\") for line in lines)) == shlex.split(example)


@pytest.mark.parametrize("parser", COMMANDS.values(), ids=COMMANDS)
def test_a_command_says_in_short_and_in_full_what_it_does(parser: Parser) -> None:
    assert len(parser.summary) <= 55
    assert (parser.description or "").endswith(".")
    assert len(parser.examples) >= 2
    for action in parser._actions:
        assert action.help, f"{action.dest} has no help"
        assert not action.help.startswith("(default"), f"{action.dest} says its default alone"


def test_the_reference_has_every_variable_that_the_code_reads_and_no_other() -> None:
    files = [file for folder in ("spectral_fast", "kernels", "csrc") for file in (ROOT / folder).rglob("*.*")]
    code = [file for file in files if file.suffix in (".py", ".cpp", ".h", ".cu") and file.name != "environment.py"]
    text = "".join(file.read_text(encoding="utf-8") for file in code)
    read = re.compile(r"""(?:environ(?:\.get|\.setdefault)?[(\[]|getenv\()["'](\w+)["']|"(SPECTRAL_FAST_\w+)\"""")
    found = {name for names in read.findall(text) for name in names if name}
    assert {"SPECTRAL_FAST_ISA", "SPECTRAL_FAST_CUDA", "VLLM_ENFORCE_EAGER"} <= found
    assert found | set(ENVIRONMENT) <= set(VARIABLES)
    assert [name for name in VARIABLES if f'"{name}"' not in text] == []


def test_info_tells_the_variables_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_FAST_DEBUG", "yes")
    monkeypatch.delenv("SPECTRAL_FAST_ISA", raising=False)
    told = describe()["environment"]
    assert told["SPECTRAL_FAST_DEBUG"] == "yes"
    assert "SPECTRAL_FAST_ISA" not in told
    assert set(told) <= set(VARIABLES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Run]]:
    with entered(tmp_path_factory.mktemp("hub")) as environment, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        done = run_examples(COMMANDS, environment)
        yield [Run(run.command, run.example, run.wrong, {k: v.resolve() for k, v in run.files.items()}) for run in done]


@pytest.mark.timeout(600)  # all examples, at the first
@pytest.mark.parametrize("example", [example for _, example in EXAMPLES])
def test_an_example_runs(example: str, runs: list[Run]) -> None:
    [wrong] = [run.wrong for run in runs if run.example == example]
    assert not wrong, wrong


# Texts that do not name all keys: they point elsewhere, or sum up.
NOT_ALL = re.compile(r"`|settings|--json|\.\.\.|by problem|summary\.csv")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_what_it_says_and_nothing_else(name: str, runs: list[Run]) -> None:
    kinds = [kind for kind in COMMANDS[name].writes if ".unfinished" not in kind]
    unseen = set(kinds)
    for file in (file for run in runs if run.command == name for file in run.files):
        kind = kind_of(file, kinds) or ("*" if "*" in kinds and file == "notes.txt" else None)
        assert kind is not None, f"{name} writes {file}, and does not say so"
        unseen.discard(kind)
    assert not unseen, f"{name} says that it writes {unseen}"


def kind_of(file: str, kinds: Iterable[str]) -> str | None:
    """The name under which the reference has a file: of several that fit, the longest."""
    fitting = []
    for kind in kinds:
        inside = ".+" if kind.endswith("/") else ""
        if kind != "*" and re.fullmatch(re.escape(kind).replace(r"\*", "[^/]*") + inside, file):
            fitting.append(kind)
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("name", [name for name, parser in COMMANDS.items() if parser.writes])
def test_the_columns_and_keys_of_a_file_are_those_that_are_told(name: str, runs: list[Run]) -> None:
    kinds = COMMANDS[name].writes
    found = [(kind_of(file, kinds), path) for run in runs if run.command == name for file, path in run.files.items()]
    for kind in kinds:
        tables = [path for of, path in found if of == kind and path.suffix in (".csv", ".json", ".jsonl")]
        if kind not in ("*", "adapter_config.json") and not kind.endswith("/") and tables:
            check_names(name, kind, tables)


def check_names(name: str, kind: str, files: Iterable[Path]) -> None:
    """Names at the top of each file are in the text, and every name in the text with a _ is in a file or a flag."""
    text = COMMANDS[name].writes[kind]
    words, inside = set(re.findall(r"[\w@]+", text)), set()
    for file in files:
        top, every = keys(file)
        inside |= every
        assert top <= words or NOT_ALL.search(text), f"{name}, {file.name}: {top - words}"
    flags = {flag.lstrip("-") for flag in COMMANDS[name]._option_string_actions}
    assert {word for word in words if "_" in word} <= inside | flags, f"{name}, {kind}"


def keys(file: Path) -> tuple[set[str], set[str]]:
    """The columns or the keys at the top of a file, and all within."""
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix == ".csv":
            top = set(next(csv.reader(lines)))
            return top, top
        content = json.load(lines) if file.suffix == ".json" else json.loads(next(lines))
    every = set(_within(content))
    return set(content[0] if isinstance(content, list) else content), every


def _within(content: Any) -> Iterator[str]:
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    yield from content if isinstance(content, dict) else ()
    for value in values:
        yield from _within(value)

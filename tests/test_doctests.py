"""Every public name shows how it is used, and that runs as it stands."""

from __future__ import annotations

import ast
import doctest
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGES = ("", ".toolbox", ".evaluation", ".study", ".sweep", ".training")
# Of these modules not all that the project uses is for users.
OTHERS = (
    ("spectral_fast.policies", "Policy"),
    ("spectral_fast.allocation", "spectral_analysis_for_adaptive_lora"),
    ("spectral_fast.evaluation.lm_eval", "harness_command"),
)
NAMES = [
    *((f"spectral_fast{p}", name) for p in PACKAGES for name in import_module(f"spectral_fast{p}").__all__),
    *OTHERS,
]
NO_DOCSTRING = {"POLICIES", "__version__"}
SHOWN_ELSEWHERE = {
    "run_lm_eval": "the harness is not installed where tests run; its command is shown by harness_command",
    "GatedSFTTrainer": "it is used as GatedTrainer",
}


def docstrings() -> dict[str, doctest.DocTest]:
    """Those of public objects and of their members that have examples, each once and with no names but its own."""
    finder = doctest.DocTestFinder()
    found = doctest.DocTestFinder(recurse=False).find(import_module("spectral_fast"), globs={})
    for thing, name in {id(t): (t, name) for name, t in things().items()}.values():
        found += finder.find(thing, name, globs={})
    return {test.name: test for test in found if test.examples}


def things() -> dict[str, Any]:
    """Full name -> public object; its first name wins where it has several."""
    found = {f"{module}.{name}": getattr(import_module(module), name) for module, name in reversed(NAMES)}
    return {name: thing for name, thing in found.items() if name.rpartition(".")[2] not in NO_DOCSTRING}


TESTS = docstrings()


@pytest.mark.parametrize("name", TESTS)
def test_what_a_docstring_shows_is_what_comes_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failed, attempted = runner.run(TESTS[name], out=told.append)
    assert attempted == len(TESTS[name].examples)
    assert not failed, "".join(told)


def test_every_public_name_is_used_in_a_docstring_or_in_an_example() -> None:
    sources = [example.source for test in TESTS.values() for example in test.examples]
    sources += [file.read_text(encoding="utf-8") for file in EXAMPLES.glob("*.py")]
    used = {
        node.id
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name)  # and not a comment, nor an import alone
    }
    public = {name for _, name in NAMES} - {"__version__"}
    assert public - used == SHOWN_ELSEWHERE.keys()


def test_the_names_at_the_top_have_docstrings_with_examples() -> None:
    top = {name for module, name in NAMES if module == "spectral_fast"} - NO_DOCSTRING
    toolbox = {name for module, name in NAMES if module == "spectral_fast.toolbox"}
    assert (top | toolbox) - {name.rpartition(".")[2] for name in TESTS} == set()
    assert len(top) <= 15

"""How fast a command line answers: help, refusals and completion import neither torch nor numpy; Ctrl-C meanwhile."""

from __future__ import annotations

import ast
import os
import pickle
import signal
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest

import spectral_fast
from spectral_fast import ModelOptions, embedded

PACKAGE = Path(spectral_fast.__file__).parent
HEAVY = {"torch", "numpy", "pandas", "transformers", "peft", "safetensors", "yaml", "tqdm", "matplotlib"}
# One process for all command lines: each ends by SystemExit, and what one imports all have imported.
ASKED = f"""
import contextlib, io, sys
import spectral_fast
from spectral_fast.cli import main

def imported(*words):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(words)
        except SystemExit:
            pass
    print(*words, *({HEAVY!r} & set(sys.modules)))
"""


def told(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_help_refusals_and_completion_import_no_torch() -> None:
    asked = ["--help", "--version", "edti", "edit", "edit --mode x", "resize --rank 0", "completion bash"]
    each = "for m in command_line()._actions[-1].choices: imported(m, '--help')\n"
    lines = told(
        f"{ASKED}\nfrom spectral_fast.cli.start import command_line\n"
        + "".join(f"imported(*{words.split()!r})\n" for words in asked)
        + each
    )
    assert lines[: len(asked)] == asked
    assert len(lines) > len(asked) + 20
    assert all(line.split()[1:] == ["--help"] for line in lines[len(asked) :])


LATER = [file for file in PACKAGE.rglob("__init__.py") if "lazily(" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", LATER, ids=lambda file: file.parent.name)
def test_type_checkers_see_what_there_is(file: Path) -> None:
    package = import_module(".".join(("spectral_fast", *file.parent.relative_to(PACKAGE).parts)))
    [block] = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    seen = {
        (alias.name, alias.asname): node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == [(name, name) for name in package.__all__]
    assert set(package.__all__) <= set(dir(package))
    for (name, _), module in seen.items():
        assert module is not None
        assert getattr(package, name) is getattr(import_module(module), name)


def test_modules_are_attributes_without_an_import_of_their_own() -> None:
    code = "import spectral_fast as sf; print(sf.toolbox.resize.resize_adapter is sf.toolbox.resize_adapter)"
    assert told(code) == ["True"]
    assert not hasattr(spectral_fast, "tool_box")
    assert not hasattr(spectral_fast, "__wrapped__")


def test_a_star_gives_all_public_names_and_settings_can_be_pickled() -> None:
    names: dict[str, object] = {}
    exec("from spectral_fast import *", names)
    assert set(spectral_fast.__all__) <= names.keys()
    options = ModelOptions(dtype="bf16")
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(ImportError, match="cannot import name 'prob'"):
        exec("from spectral_fast import prob")


# A signal to itself in the middle of an import: of the parser's modules, or of torch's.
STOPPED = """
import os, signal, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
"""


@pytest.mark.parametrize("name", ["spectral_fast.cli.parser", "torch.nn", "numpy.linalg"])
@pytest.mark.parametrize("by", ["-m spectral_fast", "spectral-fast"])
def test_ctrl_c_during_the_imports_ends_it_with_one_plain_line(name: str, by: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOPPED.format(name=name))
    script = Path(sysconfig.get_path("scripts")) / "spectral-fast"
    if by == "spectral-fast" and not script.exists():
        pytest.skip("the console script is not installed")
    start = [str(script)] if by == "spectral-fast" else [sys.executable, "-m", "spectral_fast"]
    path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["inspect", "--lora_path", str(embedded.adapter_dir())]
    done = subprocess.run([*start, *words], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "spectral-fast: interrupted; nothing was begun\n"


def test_a_program_that_calls_main_keeps_its_ctrl_c() -> None:
    code = "import signal; from spectral_fast.cli import main; main(['info']); print(signal.getsignal(signal.SIGINT))"
    assert told(code)[-1] == str(signal.default_int_handler)

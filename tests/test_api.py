"""What the commands do can be done from Python: each of them calls a public function, named here."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import spectral_fast
from spectral_fast.evaluation import HumanEvalOptions

CLI = Path(spectral_fast.__file__).parent / "cli"

# Command -> module and function. examples/ and docstrings show the two lines.
FUNCTIONS = {
    "edit": ("spectral_fast", "edit_adapter"),
    "prune": ("spectral_fast.toolbox", "prune_adapter"),
    "resize": ("spectral_fast.toolbox", "resize_adapter"),
    "clip": ("spectral_fast.toolbox", "clip_adapter"),
    "export": ("spectral_fast.toolbox", "export_adapter"),
    "merge": ("spectral_fast.toolbox", "merge_adapters"),
    "extract": ("spectral_fast.toolbox", "extract_adapter"),
    "inspect": ("spectral_fast.toolbox", "inspect_adapter"),
    "diff": ("spectral_fast.toolbox", "compare_adapters"),
    "probe": ("spectral_fast", "probe"),
    "eval": ("spectral_fast", "evaluate_adapters"),
    "eval-humaneval": ("spectral_fast", "evaluate_adapters"),
    "lm-eval": ("spectral_fast.evaluation", "run_lm_eval"),
    "sweep": ("spectral_fast.sweep", "run_sweep"),
    "ranks": ("spectral_fast", "get_adaptive_lora_config"),
    "train": ("spectral_fast.training", "train"),
    "analyze": ("spectral_fast.report.gated", "analyze"),
    "toy": ("spectral_fast.study", "run_toy"),
    "predictors": ("spectral_fast.study", "run_predictors"),
    "prune-finetune": ("spectral_fast.study", "run_prune_finetune"),
    "active-channels": ("spectral_fast.study", "run_active_channels"),
    "demo": ("spectral_fast.demo", "run_demo"),
    "bench": ("spectral_fast.bench.run", "run"),
    "info": ("spectral_fast.environment", "describe"),
    "push": ("spectral_fast", "push_to_hub"),
}
# Where a command tells more than the function returns, it calls what that is made of.
PARTS = {"ranks": "allocate"}
OF_THE_SHELL = {"completion"}


def calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def commands() -> dict[str, Path]:
    """Command -> the file that adds it."""
    found = {}
    for file in CLI.glob("*.py"):
        for call in calls(file):
            if isinstance(call.func, ast.Name) and call.func.id == "add_command":
                assert isinstance(call.args[1], ast.Constant)
                found[str(call.args[1].value)] = file
    return found


def test_every_command_has_a_function() -> None:
    assert commands().keys() - OF_THE_SHELL == FUNCTIONS.keys()


@pytest.mark.parametrize("command", FUNCTIONS)
def test_a_command_does_its_work_by_the_function_that_python_has(command: str) -> None:
    module, name = FUNCTIONS[command]
    own = commands()[command]
    used = {
        node.id
        for file in (own, CLI / "common.py")
        for call in calls(file)
        for node in ast.walk(call.func)
        if isinstance(node, ast.Name)
    }
    part = PARTS.get(command, name)
    assert part in used, f"{own.name} does not call {part}"
    function: Any = getattr(import_module(module), name)
    assert part == name or part in function.__code__.co_names, f"{name} does not call {part}"
    assert inspect.getdoc(function)
    hints = typing.get_type_hints(inspect.unwrap(function))
    signature = inspect.signature(function)
    assert {*signature.parameters, "return"} <= hints.keys()
    paths = [hint for parameter, hint in hints.items() if parameter in ("out_dir", "base_model", "lora_dir", "output")]
    # The base model of push is a name on the hub.
    assert command == "push" or all(hint == Path | str for hint in paths), "a user has paths as text, too"


@pytest.mark.parametrize("asked", [{"options": HumanEvalOptions()}, {"profile": "greedy_code"}])
def test_programs_that_a_model_wrote_are_not_run_unless_that_is_said(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="say allow_code_execution to allow it"):
        spectral_fast.evaluate_adapters("no such model", {None: None}, tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())


def test_what_is_public_is_what_is_promised() -> None:
    for package in ("", ".toolbox", ".evaluation", ".study", ".sweep", ".training"):
        module = import_module(f"spectral_fast{package}")
        assert all(hasattr(module, name) for name in module.__all__)
        assert len(set(module.__all__)) == len(module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'run_away'"):
        getattr(import_module("spectral_fast.study"), "run_away")  # noqa: B009


def test_the_package_is_imported_without_what_only_some_paths_need() -> None:
    late = {"transformers", "peft", "datasets", "pandas", "matplotlib", "vllm", "huggingface_hub"}
    late |= {f"spectral_fast.{name}" for name in ("allocation", "evaluation", "publish", "training", "toolbox")}
    code = f"import sys, spectral_fast; print(*{late!r} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == []

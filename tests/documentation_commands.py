"""How the commands of README and docs are run here: which are made small, and which are run elsewhere or cannot be."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from unittest.mock import patch

from documentation_tools import ROOT
from documentation_world import path_first

PLAIN = re.compile(r"^spectral-fast [^|<>;&$`]*$")

# (what is found in the command, what stands there instead): the same work on fewer problems, steps or programs. A flag
# right after the command's name gives way to the page's own. The numbers that a page shows of these are not compared.
SMALLER: list[tuple[str, str]] = [
    (r"--max_samples (16|200)\b", "--max_samples 2"),
    # The model has 1024 characters of context.
    (r"^spectral-fast eval(?= )(?!.*--max_samples)", r"\g<0> --max_samples 2 --fewshot 1 --max_tokens 64"),
    (r"^(spectral-fast eval .*) --eval_profile paper_math\b", r"\1"),
    (r"^spectral-fast probe\b(?=.*(Llama-3|until-stable))", r"\g<0> --calib_samples 16"),
    (r"(?<=^spectral-fast sweep )(.*) --eval_profile (paper_math|greedy_code)\b", r"\1"),  # 512 tokens
    (r"(?<=^spectral-fast sweep )(.*) --max_samples \d+ --max_tokens \d+", r"\1"),
    (r"^spectral-fast sweep\b", r"\g<0> --max_samples 2 --controls 2 --calib_samples 4 --fewshot 0 --max_tokens 8"),
    (
        r"^spectral-fast edit(?=.* --eval_gsm8k)(?!.*--eval_data)",
        r"\g<0> --eval_max_samples 4 --eval_fewshot 1 --eval_max_tokens 64",
    ),
    (r"^spectral-fast eval-humaneval\b", r"\g<0> --max_samples 2"),
    (r"--eval_profile paper_code_main\b", "--eval_profile greedy_code"),  # 50 programs of 512 tokens for each problem
    (
        r"^spectral-fast train\b(?!.*--learning_rate)",
        r"\g<0> --max_steps 3 --per_device_train_batch_size 1 --max_length 256",
    ),
    (r"--slora_burn_in \d+", "--slora_burn_in 1"),
    (r"^spectral-fast demo\b", r"\g<0> --max_samples 2"),  # all of it: make demo
    (r"^spectral-fast toy\b", r"\g<0> --trials 4"),
    (r"--n_generations 10\b(.*)--pass_k 10\b", r"--n_generations 2\1--pass_k 2 --max_tokens 16"),
    (r"^spectral-fast prune-finetune\b", r"\g<0> --train_samples 32 --eval_samples 16"),
]
# The same for what is done in another way, which changes none of the numbers.
INSTEAD: list[tuple[str, str]] = [
    (r"^spectral-fast train\b(?=.*--learning_rate)", r"\g<0> --max_steps 4"),  # as the page says
    (r"^spectral-fast lm-eval\b", r"\g<0> --dry_run"),  # lm-evaluation-harness is not installed
    (r"^torchrun --nproc-per-node \d+ -m spectral_fast\b", "spectral-fast"),  # by two processes: test_ranks.py
    (r"--device_map auto\b", "--device cpu"),
    (r"\bbench --device interpreter\b", r"\g<0> --only spectral_linear"),  # all of it: test_bench.py
]

LONG = {  # targets that are not for every commit
    "bench": "an hour",
    "adaptive": "13 minutes",
    "gate": "25 minutes",
    "spline": "20 minutes",
    "embedded": "24 minutes",
    "cuda": "needs nvcc",
    "clean": "removes .venv",
    "format": "changes the tree",
}


def _make(words: list[str]) -> str | None:
    makefile, steps = ((ROOT / file).read_text(encoding="utf-8") for file in ("Makefile", ".ci/run"))
    for target in (word for word in words[1:] if "=" not in word):
        if not re.search(rf"^{target}( |:)|^[\w ]+ {target}( [\w ]+)?:", makefile, re.MULTILINE):
            return f"the Makefile has no {target}"
        if target not in LONG and not re.search(rf"^\s*step make {target}\b", steps, re.MULTILINE):
            return f".ci/run does not call make {target}, and LONG does not say why"
    return None


def _pip(words: list[str]) -> str | None:
    _, _, project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")
    known = set(re.findall(r"^([\w-]+) = \[", project.partition("\n[")[0], re.MULTILINE))
    extras = {extra for word in words for group in re.findall(r"\[([\w,-]+)\]", word) for extra in group.split(",")}
    absent = sorted(extras - known)
    return f"pyproject.toml has no extra {absent[0]}" if absent else None


def flags_exist(words: list[str]) -> str | None:
    """What is not run has a command and flags that exist at least."""
    from spectral_fast.cli.start import command_line

    [commands] = [action for action in command_line()._actions if action.dest == "command"]
    name, *arguments = words[words.index("spectral-fast") + 1 :]
    if name not in commands.choices:
        return f"there is no command {name}"
    flags = {word.partition("=")[0].replace("-", "_") for word in arguments if word[:2] == "--"}
    known = {flag.replace("-", "_") for flag in commands.choices[name]._option_string_actions}
    return f"{name} has no {sorted(flags - known)[0]}" if flags - known else None


def _nothing(_: list[str]) -> str | None:
    return None


# (pattern, reason, what is checked of it here)
NOT_HERE: list[tuple[str, str, Callable[[list[str]], str | None]]] = [
    (r"^make ", "its targets are run by .ci/run, or take too long", _make),
    (r"^(\S*python3? -m )?pip (install|uninstall) ", "there is no network; CI installs by the Makefile", _pip),
    (r"^OMP_NUM_THREADS=1 pytest benchmarks\b", "measurements of single kernels", _nothing),
    (r"^python -m benchmarks", "measurements; make bench-smoke runs them on tiny sizes", _nothing),
    (r"--device cuda\b", "there is no GPU", flags_exist),
    (r"--load_in_4bit", "bitsandbytes is not installed", flags_exist),
    (r"^mergekit-yaml ", "mergekit wants other versions; the page says what came out with 0.1.5", _nothing),
]


def not_here(command: str) -> tuple[str, str | None] | None:
    """Why a command is not run, and what is wrong with it nevertheless; None for one that is run."""
    for pattern, reason, check in NOT_HERE:
        if re.search(pattern, command):
            return reason, check(shlex.split(command))
    return None


def rewritten(command: str, rules: list[tuple[str, str]]) -> str:
    """The command with what rules say in place of what they find."""
    for pattern, instead in rules:
        command = re.sub(pattern, instead, command)
    return command


def made_small(command: str) -> bool:
    """Whether it is run with other numbers than a page shows."""
    return rewritten(command, SMALLER) != command


def perform_command(command: str, environment: Mapping[str, str]) -> str:
    """Run a command, or check what is checked of one that is not run; returns what it prints."""
    if (elsewhere := not_here(command)) is None:
        return run(rewritten(command, SMALLER + INSTEAD), environment)
    assert elsewhere[1] is None, f"{command}: {elsewhere[1]}"
    return ""


def run_plain(command: str) -> tuple[int, str, str]:
    """A command of spectral-fast in this process: an import of torch less."""
    from spectral_fast.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(patch.dict(os.environ))
        stack.enter_context(patch.dict("spectral_fast.backends._chosen", clear=True))  # records name a process's own
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # PEFT's, that a model's config is not on the hub
        try:
            status = main(shlex.split(command)[1:])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
    return status, out.getvalue(), err.getvalue()


def run(command: str, environment: Mapping[str, str]) -> str:
    """What a command prints; fails with the end of what it said where it fails."""
    began = time.perf_counter()
    if PLAIN.match(command):
        status, out, err = run_plain(command)
    else:
        done = subprocess.run(
            ["bash", "-c", command],
            env={**os.environ, **environment, **path_first()},
            capture_output=True,
            text=True,
            check=False,
        )
        status, out, err = done.returncode, done.stdout, done.stderr
    print(f"{time.perf_counter() - began:6.1f} s  {command}")  # pytest -rP shows the report of a page
    assert status == 0, f"{command}\nended with {status}: {(out + err)[-1500:]}"
    return out

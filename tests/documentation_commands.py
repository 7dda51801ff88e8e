"""How the commands of README and docs are run here: which are made small, and which are run elsewhere or cannot be."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from documentation_tools import ROOT

# (what is found in the command, what stands there instead): the same work on fewer problems, steps or programs. A flag
# right after the command's name gives way to the page's own.
SMALLER: list[tuple[str, str]] = [
    (r"^spectral-fast eval(?= )", r"\g<0> --max_samples 4"),
    (r"^spectral-fast sweep\b", r"\g<0> --max_samples 2 --controls 2"),
    (r"^spectral-fast eval-humaneval\b", r"\g<0> --max_samples 2"),
    (r"--eval_profile paper_code_main\b", "--eval_profile greedy_code"),  # 50 programs of 512 tokens for each problem
    (r"^spectral-fast edit(?=.* --eval_gsm8k)", r"\g<0> --eval_max_samples 4"),
    (r"^spectral-fast train\b", r"\g<0> --max_steps 3 --per_device_train_batch_size 1 --max_length 256"),
    (r"--slora_burn_in \d+", "--slora_burn_in 1"),
    (r"^spectral-fast demo\b", r"\g<0> --max_samples 4"),
    (r"^spectral-fast toy\b", r"\g<0> --trials 4"),
    (r"^spectral-fast prune-finetune\b", r"\g<0> --train_samples 32 --eval_samples 16"),
    (r"^spectral-fast lm-eval\b", r"\g<0> --dry_run"),  # lm-evaluation-harness is not installed
    (r"--nproc-per-node \d+", "--nproc-per-node 2"),
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
    from spectral_fast.cli import command_line

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


def made_small(command: str) -> str:
    """The command as it is run."""
    for pattern, instead in SMALLER:
        command = re.sub(pattern, instead, command)
    return command

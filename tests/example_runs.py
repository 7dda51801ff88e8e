"""Every example of `--help`, run once, in one folder: what one leaves is there for those that name it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from documentation_commands import not_here, perform_command
from documentation_world import own_files
from sweep_tools import problems_file, programs_file

from spectral_fast.cli.parser import Parser

LAST = ("diff", "push")  # they read what commands after them in --help have written

CONFIGS = {"lora_repo_id": "ORG/ADAPTER", "eval_data": "programs.jsonl", "task": "humaneval", "keep_adapter": True}
TRAINING = """
model: {model_name_or_path: meta-llama/Llama-3.1-8B, lora_r: 2, lora_target_modules: [q_proj]}
data: {train_dataset_path: mine.jsonl, train_samples: 4}
training: {output_dir: ./trained, save_steps: 1, logging_steps: 1}
system_monitor: true
use_spline: true
"""


@dataclass(frozen=True)
class Run:
    """An example that was run, or only checked: what was wrong, and file as the reference names it -> where it is."""

    command: str
    example: str
    wrong: str
    files: Mapping[str, Path]


def run_examples(parsers: Mapping[str, Parser], environment: Mapping[str, str]) -> list[Run]:
    """Run them in the current folder."""
    _furnish(Path(environment["HF_HOME"]))
    home = Path(environment["HF_HOME"]) / "user"
    (home / ".zfunc").mkdir(parents=True)
    runs = []
    for name in sorted(parsers, key=LAST.__contains__):
        for example in parsers[name].examples:
            before, wrong = _state(), ""
            try:
                perform_command(example, {**environment, "HOME": str(home)})
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            written = [file for file, when in _state().items() if before.get(file) != when]
            named = {} if not_here(example) else _named(parsers[name], example)
            runs.append(Run(name, example, wrong, {named.get(x, "/".join(x.parts[1:]) or x.name): x for x in written}))
    return runs


def _furnish(home: Path) -> None:
    """The user's own files that examples name."""
    here = Path()
    for name, source in own_files(home).items():
        (here / name).symlink_to(source)
    (here / "mine.jsonl").symlink_to(home / "train.jsonl")
    (here / "sentences").mkdir()
    rows = [{"sentence": f"{word} film", "label": i % 2} for i, word in enumerate(("good", "bad") * 4)]
    for split in ("train", "validation"):
        (here / "sentences" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems_file(here, 2)
    programs_file(here, 2)
    (here / "grid.yaml").write_text("lora_repo_id: ORG/ADAPTER\nedit_mode: [abs_select, smooth_abs]\n")
    (here / "configs.jsonl").write_text(json.dumps(CONFIGS) + "\n")
    (here / "train.yaml").write_text(TRAINING)


def _state() -> dict[Path, tuple[int, int]]:
    """All files in the current folder, and what tells whether they were written since."""
    files = [Path(folder, name) for folder, _, names in os.walk(".") for name in names]
    return {file: (status.st_mtime_ns, status.st_size) for file in files for status in [file.lstat()]}


def _named(parser: Parser, example: str) -> dict[Path, str]:
    """Files that flags name, such as --out_json FILE, by their defaults too."""
    words = shlex.split(example.partition(" > ")[0])
    args = vars(parser.parse_known_args(words[words.index(_name(parser)) + 1 :])[0])
    return {Path(args[flag.dest]): f"{flag.option_strings[0]} FILE" for flag in _files(parser) if args.get(flag.dest)}


def _files(parser: Parser) -> list[argparse.Action]:
    return [flag for flag in parser._actions if flag.metavar == "FILE" and flag.option_strings]


def _name(parser: Parser) -> str:
    return parser.prog.partition(" ")[2]

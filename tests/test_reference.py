"""The reference is what the parser says, examples parse, and commands write what they say that they write."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from extract_tools import low_rank, two_models
from sweep_tools import problems_file, programs_file

from spectral_fast import embedded
from spectral_fast.calibration.ranks import ENVIRONMENT
from spectral_fast.cli import command_line, main
from spectral_fast.cli.common import broken
from spectral_fast.cli.parser import STATUSES, Parser
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


class World:
    """A folder in which every command has been run. What one wrote is in NAME/out*, files that flags name beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(embedded.adapter_dir(), folder / "adapter")
        (folder / "adapter" / "notes.txt").write_text("of the source")
        problems, programs = problems_file(folder, 2), programs_file(folder, 2)
        rows = [{"sentence": f"{word} film", "label": i % 2} for i, word in enumerate(("good", "bad") * 4)]
        for name in ("train", "validation"):
            (folder / "sentences").mkdir(exist_ok=True)
            (folder / "sentences" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        edit = {"lora_local_path": str(folder / "adapter"), "keep_adapter": True, "eval_max_tokens": 4}
        configs = [{**edit, "eval_data": str(problems), "eval_fewshot": 0}]
        configs += [{**edit, "eval_data": str(programs), "task": "humaneval", "edit_mode": "random_index"}]
        (folder / "configs.jsonl").write_text("".join(json.dumps(config) + "\n" for config in configs))
        self.base, self.tuned = two_models(folder, low_rank)
        self.problems, self.programs = str(problems), str(programs)

    def run(self) -> None:
        """Every command, in the order in which they need each other."""
        base = ["--base_model", str(embedded.base_model_dir())]
        lora, evaluated = ["--lora_path", "adapter"], ["--lora_dir", "adapter"]
        samples = ["--calib_data", str(embedded.calibration_file()), "--calib_samples", "2"]
        few = ["--max_tokens", "4", "--engine", "transformers"]
        asked = ["--eval_data", self.problems, "--eval_fewshot", "0", "--eval_max_tokens", "4"]
        written = ["--eval_data", self.programs, "--allow_code_execution", *few]
        trained = ["--model_name_or_path", base[1], "--train_dataset_path", samples[1], "--train_samples", "4"]
        trained += ["--lora_r", "2", "--lora_target_modules", "q_proj", "--no_gradient_checkpointing"]
        trained += [
            "--max_steps",
            "2",
            "--per_device_train_batch_size",
            "1",
            "--save_steps",
            "1",
            "--logging_steps",
            "1",
        ]
        gated = ["--slora_enable", "--slora_burn_in", "1", "--system_monitor", "--use_spline"]
        self.command("probe", *base, *lora, *samples)
        report = ["--report", "edit/--report FILE", "--eval_gsm8k", *asked, "--eval_engine", "transformers"]
        self.command("edit", *base, *lora, "--sensitivity", "probe/out", *report)
        self.command("prune", *lora)
        self.command("resize", *lora, "--rank", "4")
        self.command("clip", *lora)
        self.command("export", *lora, "--bake_scaling")
        self.command("merge", "--lora_path", "adapter", "prune/out", "--weights", "1", "-1")
        self.command("extract", "--base_model", self.base, "--tuned_model", self.tuned, "--rank", "2")
        self.command("inspect", *lora)
        self.command("eval", *base, *evaluated, "--eval_data", self.problems, "--fewshot", "0", *few,
                     "--out_json", "eval/--out_json FILE")  # fmt: skip
        self.command("eval", *base, *evaluated, "--eval_profile", "greedy_code", *written, out="out2")
        self.command("eval-humaneval", *base, *evaluated, *written, "--out_json", "eval-humaneval/--out_json FILE")
        sweep = ["--allow_code_execution", "--controls", "1", "--engine", "transformers"]
        self.command("sweep", "configs.jsonl", *base, *samples, *sweep)
        self.command("ranks", *base)
        self.command("ranks", *base, "--sensitivity", "probe/out", out="out2")
        self.command("train", *trained, flag="--output_dir")
        self.command("train", *trained, *gated, flag="--output_dir", out="out2")
        pair = ["--baseline", "train/out", "--slora", "train/out2"]
        self.command("analyze", *pair, flag="--output", out="out/--output FILE")
        self.command("toy", "--n", "6", "--m", "6", "--ranks", "2", "--trials", "2")
        small = ["--max_layers", "2", "--max_elems", "30000", "--run_experiment"]
        self.command("predictors", "--model", base[1], *small)
        self.command(
            "prune-finetune", "--model", base[1], "--dataset", "sentences", "--target_modules", "q_proj,v_proj"
        )
        self.command("active-channels", *base, *samples, "--sparsity", "0.9")
        self.command("demo", "--max_samples", "1")

    def command(self, name: str, *words: str, flag: str = "--out_dir", out: str = "out") -> None:
        (self.folder / name).mkdir(exist_ok=True)
        assert main([name, *words, flag, str(Path(name, out))]) == 0, name

    def files(self, name: str) -> dict[str, list[Path]]:
        """Name as the reference has it -> files of that name that a command wrote."""
        found: dict[str, list[Path]] = {}
        for file in sorted(x for x in (self.folder / name).rglob("*") if x.is_file()):
            place = file.relative_to(self.folder / name)
            inside = place.parts[0] in ("out", "out2")
            found.setdefault("/".join(place.parts[1:] if inside else place.parts), []).append(file)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    given = {path.name for path in made.folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        made.run()
    assert {path.name for path in made.folder.iterdir()} <= given | set(COMMANDS)
    return made


# Texts that do not name all keys: they point elsewhere, or sum up.
NOT_ALL = re.compile(r"`|settings|\.\.\.|by problem|summary\.csv")
WRITERS = [name for name, parser in COMMANDS.items() if parser.writes and name != "bench"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_command_writes_what_it_says_and_nothing_else(name: str, world: World) -> None:
    kinds = [kind for kind in COMMANDS[name].writes if ".unfinished" not in kind]
    copied = [path.name for path in (world.folder / "adapter").iterdir()]
    unseen = set(kinds)
    for file in world.files(name):
        kind = kind_of(file, kinds) or ("*" if "*" in kinds and file in copied else None)
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


@pytest.mark.parametrize("name", WRITERS)
def test_the_columns_and_keys_of_a_file_are_those_that_are_told(name: str, world: World) -> None:
    for kind in COMMANDS[name].writes:
        mine = [found for file, found in world.files(name).items() if kind_of(file, COMMANDS[name].writes) == kind]
        tables = [file for found in mine for file in found if file.suffix in (".csv", ".json", ".jsonl")]
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


def test_bench_writes_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the interpreter is off")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--device", "interpreter", "--only", "batched_svd", "--out_json", "bench.json"]) == 0
    [file] = tmp_path.iterdir()
    check_names("bench", "--out_json FILE", [file])


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


@pytest.mark.parametrize(
    "words",
    [
        ["diff", "adapter", "adapter"],
        ["info"],
        ["lm-eval", "--base_model", "base", "--lora_dir", "adapter", "--dry_run"],
        ["completion", "bash"],
        ["push", "--lora_dir", "adapter", "--repo_id", "ORG/NAME", "--dry_run"],
    ],
    ids=lambda words: words[0],
)
def test_other_commands_write_nothing(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not COMMANDS[words[0]].writes
    shutil.copytree(embedded.adapter_dir(), tmp_path / "adapter")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert set(COMMANDS) == {*WRITERS, "bench", "diff", "info", "lm-eval", "completion", "push"}

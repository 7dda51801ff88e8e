"""README and docs are true: every command runs, every script too, the output shown is the real one, links lead on.

A page is a story: its blocks run in order in one folder. Names on the hub are those of documentation_world.py; what is
made smaller, and what is not run here, stands in documentation_commands.py.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import documentation_world as world
import pytest
from documentation_commands import INSTEAD, NOT_HERE, SMALLER, flags_exist, made_small, perform_command
from documentation_output import missing_lines
from documentation_tools import ROOT, Block, blocks, broken_links, inline_commands, program

from spectral_fast.demo import as_text
from spectral_fast.evaluation.comparison import compare
from spectral_fast.evaluation.evaluate import read_correct

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# huggingface_hub's own, about how it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
# Reference pages are no stories: test_reference.py runs their examples, and knows what they are made of.
STORIES = [page for page in PAGES if page.parent.name != "reference"]


class Printed(NamedTuple):
    """What a block's commands printed, and whether one was made smaller."""

    text: str
    small: bool


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with world.entered(tmp_path_factory.mktemp("hub")) as environment:
        yield environment


def perform(block: Block, page: str, folder: Path, environment: dict[str, str], before: Printed) -> Printed:
    """Do what a block says; returns what its commands printed, or else what the block before did."""
    where = f"{page}:{block.line}"
    if block.commands:
        printed = ""
        for command in block.commands:
            assert program(command), f"{where}: is this a command? {command}"
            printed += perform_command(command, environment)
        return Printed(printed, any(map(made_small, block.commands)))
    if block.language == "python":
        exec(compile(block.text, where, "exec"), {"__name__": page})
    elif block.language == "py":
        pass  # a file of the tree itself: test_worked_op.py puts it there
    elif block.file is not None and (block.language != "json" or not (folder / block.file).exists()):
        (folder / block.file).write_text(block.text, encoding="utf-8")
    elif block.file is not None:
        absent = missing_lines(block.text, (folder / block.file).read_text(encoding="utf-8"))
        assert not absent, f"{where}: {block.file} has other lines than\n" + "\n".join(absent)
    elif block.language in ("text", "output", "json"):  # output is of sentences: the site breaks its lines
        absent = missing_lines(block.text, before.text, small=before.small)
        assert not absent, f"{where} shows what is not printed:\n" + "\n".join(absent) + f"\n--- but\n{before.text}"
    else:  # a formula, a tree of files; not a command of which the program or the language is misspelt
        assert not block.language, f"{where}: what is {block.language}?"
        assert not re.search(r"(?<=\s)--\w", block.text), f"{where}: is this a command? {block.text}"
    return before


@pytest.mark.timeout(600)  # a page's commands together
@pytest.mark.parametrize("page", STORIES, ids=names(STORIES))
def test_a_page_tells_the_truth(
    page: Path, hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, source in world.own_files(Path(hub["HF_HOME"])).items():
        (tmp_path / name).symlink_to(source)
    story = list(blocks(page.read_text(encoding="utf-8")))
    for block in reversed(story):  # a command may come before the file that it reads; the first of a name counts
        if block.file is not None and block.language == "yaml":
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    printed, wrong = Printed("", small=False), []
    for block in story:
        try:
            printed = perform(block, page.name, tmp_path, hub, printed)
        except Exception as error:  # what comes after may be true nevertheless
            wrong.append(f"{page.name}:{block.line}: {type(error).__name__}: {error}")
    assert not wrong, "\n\n".join([f"{len(wrong)} blocks of {page.name} are not true:", *wrong])


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_within_the_text_have_flags_that_exist(page: Path) -> None:
    for command in inline_commands(page.read_text(encoding="utf-8")):
        assert flags_exist(shlex.split(command.replace("COMMAND", "info"))) is None, command  # it stands for any


def test_the_demo_that_pages_show_is_what_make_demo_left() -> None:
    folder = ROOT / "demo-output" / "evaluation"
    if not (folder.parent / "report.html").exists():  # what a demo writes last; CI runs one before the tests
        pytest.skip("make demo was not run here")
    original, rows = read_correct(folder / "gsm8k_predictions_original.jsonl"), []
    for name in ("original", "edited", "random_control_1", "random_control_2"):
        metric = json.loads((folder / f"eval_config_{name}.json").read_text(encoding="utf-8"))["metric"]
        against = compare(original, read_correct(folder / f"gsm8k_predictions_{name}.jsonl"))
        row = {
            "adapter": name.replace("_", " "),
            "accuracy": metric["score"],
            "standard_error": metric["standard_error"],
        }
        pair = vars(against) if rows else {"difference": None}
        rows.append({**row, **{key: pair.get(key) for key in ("difference", "interval", "p_value")}})
    told = as_text({"rows": rows, "problems": len(original), "report": "", "seconds": 0}).splitlines()[:-1]
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert "\n".join(told) in page.read_text(encoding="utf-8")


def test_links_lead_to_files_and_headings_that_are_there() -> None:
    assert broken_links({page: page.read_text(encoding="utf-8") for page in PAGES}) == []


def test_make_docs_fails_where_the_nav_names_a_page_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    [words] = re.findall(r"/mkdocs (build .*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A page\n", encoding="utf-8")
    for page, status in (("index.md", 0), ("absent.md", 1)):
        (tmp_path / "mkdocs.yml").write_text(f"site_name: site\nnav: [{page}]\n", encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "mkdocs", *words.split()], cwd=tmp_path, check=False)
        assert done.returncode == status


def test_every_exception_is_for_a_command_that_some_page_has() -> None:
    commands = [command for page in PAGES for block in blocks(page.read_text("utf-8")) for command in block.commands]
    patterns = [row[0] for row in NOT_HERE] + [row[0] for row in SMALLER + INSTEAD]
    assert [pattern for pattern in patterns if not any(re.search(pattern, command) for command in commands)] == []


@pytest.mark.parametrize(
    ("shown", "real", "the_same"),
    [
        ("8 modules", "9 modules", False),
        ("62.7% kept", "62.8% kept", True),  # 62.75, nearly
        ("62.7% kept", "62.9% kept", False),
        ("changed 65% of it", "changed 66% of it", True),
        ("changed 65% of it", "changed 67% of it", False),
        ("changed 65% of it", "changed 65 of it", False),
        ("p = 0.281", "p = 0.284", False),
        ("sha256 0123456789abcdef", "sha256 fedcba9876543210", True),
        ("219,136 of 438,272", "219136 of 438272", True),
        ("-2.0% to +1.2%", "2.0% to +1.2%", False),
        ("0.026093198272", "0.026093198999", True),
        ("0.026093198272", "0.026099198272", False),
        ("131 s in all, torch 2.13.0+cpu", "7 s in all, torch 3.0.1", True),
        ("rank 16 -> merged", "rank 16 -> split", False),
    ],
)
def test_numbers_agree_to_the_last_place_shown_but_times_and_versions(shown: str, real: str, the_same: bool) -> None:
    assert (missing_lines(shown, real) == []) == the_same


@pytest.mark.parametrize(
    ("markdown", "complaint"),
    [
        ("    spectral-fast inspect --lora_path ORG/NOWHERE\n", "ended with 1"),
        ("    spectral-fast inspect --no_such_flag\n", "ended with 2"),
        ("```bash\nspectral-fast info\nrm -rf build\n```\n", "is this a command?"),
        ("    spectralfast inspect --lora_path ORG/ADAPTER\n", "is this a command?"),
        ("```pyhton\nraise ValueError('unseen')\n```\n", "what is pyhton?"),
        ("    make no-such-target\n", "the Makefile has no no-such-target"),
        ("    pip install 'spectral-fast[magic]'\n", "no extra magic"),
        ("```bash\nspectral-fast info\n```\n\n```text\nno such line\n```\n", "shows what is not printed"),
        (
            "```bash\nspectral-fast prune --lora_path ORG/ADAPTER --out_dir p --keep_ratio 0.5 --compact\n```\n\n"
            "```text\nkept 321 of 640 channels in 20 modules (channel_energy, left out) -> p\n```\n",
            "shows what is not printed",
        ),
        ("```python\nraise ValueError('seen')\n```\n", "seen"),
    ],
)
def test_a_page_that_is_wrong_is_found_out(
    markdown: str, complaint: str, hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text(f"A page\n\n{markdown}", encoding="utf-8")
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        test_a_page_tells_the_truth(tmp_path / "page.md", hub, tmp_path, monkeypatch)

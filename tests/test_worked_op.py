"""The op that docs/kernels.md adds, step by step, is added to a copy of the tree, and does what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documentation_output import missing_lines

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
TITLED = re.compile(r'^```py title="([\w/.]+)(, at the end)?"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as it is once the page's files are in it; what they do not touch is linked."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for folder in ("kernels", "spectral_fast", "tests"):
        (tree / folder).mkdir()
    for file in [*(ROOT / "kernels").iterdir(), *(ROOT / "spectral_fast").iterdir()]:
        (tree / file.relative_to(ROOT)).symlink_to(file)
    (tree / "spectral_fast" / "kernels").unlink()
    (tree / "spectral_fast" / "kernels").symlink_to("../kernels")
    for name in ("pyproject.toml", "tests/conftest.py"):
        (tree / name).symlink_to(ROOT / name)
    for name, added, text in TITLED.findall(PAGE.read_text(encoding="utf-8")):
        file = tree / name
        assert file.exists() == bool(added), f"{name} {'is not' if added else 'is already'} in the tree"
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"\n\n{text}" if added else text)
    return tree


def python(tree: Path, *arguments: str, **environment: str) -> str:
    """What a command prints in that tree; fails with all it said where it fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "PYTHONPATH": str(tree), **environment}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_backends_agree_it_passes_opcheck_and_its_benchmark_runs(tree: Path) -> None:
    files = ("tests/test_row_energy.py", "benchmarks/test_kernels.py")
    told = python(
        tree, "-m", "pytest", "-q", *files, "-k", "energy", "--benchmark-disable", "-p", "no:cacheprovider",
        TRITON_INTERPRET="1", PYTEST_ADDOPTS="",
    )  # fmt: skip
    cases = 3 * 3 * 4 + 1 + 1 + 2
    assert f"{cases} passed" in told, told


def test_its_traffic_is_what_the_interpreter_moves_and_the_least_there_is(tree: Path) -> None:
    program = f"""
import runpy, torch
from benchmarks import roofline, traffic
from spectral_fast.kernels.row_energy import row_energy
counting = runpy.run_path({str(ROOT / "tests" / "test_roofline.py")!r})["counting"]

def around(launch, start):
    with counting() as count:
        start()
    moved = launch.traffic()
    assert (count.loaded, count.stored) == (moved.loaded, moved.written), (count.loaded, moved)

with traffic.recorded(around) as launches:
    row_energy(torch.ones(3, 1100, dtype=torch.bfloat16))
assert len(launches) == 1
row = roofline.energy_row(roofline.LLAMA2_7B, 64)
assert row.ratio == row.worst == 1
print(row.kernel, row.workload)
"""
    assert python(tree, "-c", program, TRITON_INTERPRET="1") == "row_energy Llama-2-7B, 224 modules, r = 64\n"


def test_it_compiles_without_a_spill(tree: Path) -> None:
    shown = re.search(
        r"^    python (-m benchmarks\.codegen .*)\n\nprints\n\n```\n(.*?)^```",
        PAGE.read_text(encoding="utf-8"),
        re.M | re.S,
    )
    assert shown is not None
    told = python(tree, *shown[1].split(), "--jobs", "1")
    seconds = re.compile(r"\d+\.\d$", re.MULTILINE)  # the last column
    assert missing_lines(seconds.sub("", shown[2]), seconds.sub("", told)) == []
    assert "5 kernels in" in told
    assert "0 failures" in told

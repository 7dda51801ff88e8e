"""What the ahead-of-time compiler's report must notice."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import codegen as compiling
from spectral_fast.kernels import gpu

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]


def codegen(kernels: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.codegen` for kernels of ``codegen_kernels``, in a process that is not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CODEGEN_KERNELS": kernels, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "benchmarks.codegen", "codegen_kernels", "--jobs", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is kept of a good kernel on every architecture."""
    file = tmp_path_factory.mktemp("codegen") / "codegen.csv"
    done = codegen("good", "--out", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    return file


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def falsified(table: Path, folder: Path) -> Path:
    """A copy of the table with other registers for sm_90."""
    file = folder / "codegen.csv"
    found = re.subn(r"(?m)^(codegen_kernels,good,sm_90,)\d+", r"\g<1>999", table.read_text())
    assert found[1] == 1
    file.write_text(found[0])
    return file


def test_a_good_kernel_passes_on_every_architecture_and_its_figures_are_kept(table: Path) -> None:
    kept = rows(table)
    assert [row["arch"] for row in kept] == ["sm_80", "sm_90", "sm_90", "sm_100", "sm_120", "gfx942"]
    assert [row["variant"] for row in kept if row["arch"] == "sm_90"] == ["good", "good, any sizes"]
    kinds = [row["matrix_instructions"].split()[0] for row in kept]
    assert kinds == ["HMMA", "HGMMA", "HGMMA", "UTCHMMA", "HMMA", "v_mfma"]
    assert len({row["key"] for row in kept}) == len(kept)
    for row in kept:
        assert 32 <= int(row["registers"]) <= 255
        # Of x, 64 × 64 in two bytes, at least one stage.
        assert 64 * 64 * 2 <= int(row["shared_bytes"]) <= 64 * 1024
        assert row["spill_bytes"] == "0"
        assert not any("second" in column for column in row)


def test_each_wrong_kernel_is_named_with_what_is_wrong_and_fails_the_command(table: Path, tmp_path: Path) -> None:
    out = falsified(table, tmp_path)
    before = out.read_text()
    done = codegen("good,spilling,deep,scalar,unnamed", "--arch", "sm_90", "--out", str(out))
    assert done.returncode == 1
    assert out.read_text() == before
    good, spilling, deep, scalar, unnamed = (line for line in done.stderr.splitlines() if "any sizes" not in line)
    assert "good for sm_90: the table says {'registers': '999'}, of the same source and compiler" in good
    assert "a sum of 512 registers a thread for sm_90: spills " in spilling
    assert "16 stages of 16 KiB for sm_90: 262144 bytes of shared memory; a program can have 232448" in deep
    assert "float32 has no matrix instruction for sm_90: its products must run on matrix units" in scalar
    assert "an argument without a type for sm_90: does not compile: " in unnamed
    assert "9 kernels in" in done.stdout
    assert "7 failures" in done.stdout  # for any sizes, spills are none


def test_of_what_the_table_has_only_one_in_so_many_is_compiled_again(table: Path, tmp_path: Path) -> None:
    out = falsified(table, tmp_path)
    before = rows(out)
    done = codegen("good", "--again", str(2**64), "--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 kernels in" in done.stdout
    assert "6 more are unchanged" in done.stdout
    assert rows(out) == before


@pytest.mark.skipif(not gpu.INTERPRETED, reason="a GPU is here")
def test_nothing_is_compiled_under_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        compiling.main([])
    assert error.value.code == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err

"""What the ahead-of-time compiler's report must notice."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]


def codegen(kernels: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.codegen` for kernels of ``codegen_kernels``, in a process that is not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CODEGEN_KERNELS": kernels, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "benchmarks.codegen", "codegen_kernels", "--jobs", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_good_kernel_passes_on_every_architecture_and_its_figures_are_kept(tmp_path: Path) -> None:
    done = codegen("good", "--out", str(tmp_path / "codegen.csv"))
    assert (done.returncode, done.stderr) == (0, "")
    with (tmp_path / "codegen.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arch"] for row in rows] == ["sm_80", "sm_90", "sm_90", "sm_100", "sm_120", "gfx942"]
    assert [row["variant"] for row in rows if row["arch"] == "sm_90"] == ["good", "good, any sizes"]
    kinds = [row["matrix_instructions"].split()[0] for row in rows]
    assert kinds == ["HMMA", "HGMMA", "HGMMA", "UTCHMMA", "HMMA", "v_mfma"]
    for row in rows:
        assert 32 <= int(row["registers"]) <= 255
        # Of x, 64 × 64 in two bytes, at least one stage.
        assert 64 * 64 * 2 <= int(row["shared_bytes"]) <= 64 * 1024
        assert row["spill_bytes"] == "0"
        assert not any("second" in column for column in row)


def test_each_wrong_kernel_is_named_with_what_is_wrong_and_fails_the_command(tmp_path: Path) -> None:
    out = tmp_path / "codegen.csv"
    done = codegen("good,spilling,deep,scalar,unnamed", "--arch", "sm_90", "--out", str(out))
    assert done.returncode == 1
    assert not out.exists()
    spilling, deep, scalar, unnamed = (line for line in done.stderr.splitlines() if "any sizes" not in line)
    assert "a sum of 512 registers a thread for sm_90: spills " in spilling
    assert "16 stages of 16 KiB for sm_90: 262144 bytes of shared memory; a program can have 232448" in deep
    assert "float32 has no matrix instruction for sm_90: its products must run on matrix units" in scalar
    assert "an argument without a type for sm_90: does not compile: " in unnamed
    assert "9 kernels in" in done.stdout
    assert "6 failures" in done.stdout  # for any sizes, spills are none


def test_nothing_is_compiled_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "benchmarks.codegen"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr

"""The CUDA kernels: run on the host by csrc/cuda/host_shim.h, and compiled by nvcc where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from svd_tools import assert_is_svd, hard_matrices, several
from torch import Tensor

from spectral_fast.kernels.batched_svd import batched_svd, cuda

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc/cuda/jacobi.cu"
COMPILER = shutil.which("c++") or shutil.which("g++")
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
pytestmark = pytest.mark.skipif(COMPILER is None or not SOURCE.exists(), reason="no C++ compiler, or no csrc")


def compiled(target: Path, *arguments: str) -> Path:
    result = subprocess.run(
        [str(COMPILER), *STRICT, *arguments, "-o", target], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return target


def shared_library(target: Path, *arguments: str) -> str:
    return str(compiled(target, "-O2", "-shared", "-fPIC", *arguments, "-x", "c++", str(SOURCE)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shared_library(tmp_path_factory.mktemp("cuda") / "jacobi.so")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With warps of 8 lanes: a lane then holds 1, 2 or 4 elements at a quarter of the rank, a sixteenth of the time."""
    return shared_library(tmp_path_factory.mktemp("narrow") / "jacobi.so", "-DSHIM_WARP=8")


@pytest.fixture(autouse=True)
def _chosen(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_FAST_CUDA", library)


def check(x: Tensor) -> None:
    u, s, vh, status = cuda.svd_launch(x)
    assert (status == 0).all()
    assert_is_svd(x, u, s, vh)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_around_what_a_narrow_warp_holds(
    r: int, dtype: torch.dtype, narrow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_FAST_CUDA", narrow)
    check(several(2, r, dtype))


@pytest.mark.parametrize("r", [1, 2, 3, 31, 33])
def test_ranks_around_what_a_warp_holds(r: int) -> None:
    check(several(1, r, torch.float32))


@pytest.mark.parametrize("r", [64, 65, cuda.MAX_RANK])
def test_large_ranks(r: int) -> None:
    """Nearly diagonal, so that a few sweeps are enough."""
    check(torch.diag(torch.linspace(1, 0, r))[None] + 1e-5 * several(1, r, torch.float32))


@pytest.mark.parametrize("r", [9, 18])
@pytest.mark.parametrize("name", hard_matrices(9))
def test_hard_matrices(r: int, name: str, narrow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_FAST_CUDA", narrow)
    check(hard_matrices(r)[name][None].float())


def test_the_public_function_takes_it_where_the_environment_names_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tensors of a GPU are not for the host's library")
    monkeypatch.setenv("SPECTRAL_FAST_BACKEND", "gpu")
    calls: list[Any] = []
    launch = cuda.svd_launch
    monkeypatch.setattr(cuda, "svd_launch", lambda x: calls.append(x.shape) or launch(x))
    x = several(2, 5, torch.float32)
    assert_is_svd(x, *batched_svd(x))
    assert calls == [(2, 5, 5)]
    x[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match="matrix 1 of x holds a NaN or an infinity"):
        batched_svd(x)


def test_a_matrix_that_is_not_finite_or_overflows_spoils_no_other() -> None:
    x = several(3, 4, torch.float32)
    x[0] = torch.finfo(torch.float32).max
    x[1, 2, 3] = torch.nan
    u, s, vh, status = cuda.svd_launch(x)
    assert status.tolist() == [2, 1, 0]
    assert s[1].isnan().all()
    assert_is_svd(x[2:], u[2:], s[2:], vh[2:])


def test_a_rank_that_is_too_large_is_not_chosen_and_not_launched() -> None:
    assert cuda.chosen(torch.ones(1, 128, 128))
    assert not cuda.chosen(torch.ones(1, 128, 128, dtype=torch.float64))  # 267 KB of shared memory
    assert not cuda.chosen(torch.ones(1, 129, 129))
    with pytest.raises(RuntimeError, match="r = 129: error -1"):
        cuda.svd_launch(torch.ones(1, 129, 129))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ThreadSanitizer works, the directory of copies of the sources to be changed and compiled with it."""
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text(
        "#include <sanitizer/tsan_interface.h>\nint main() { return __tsan_get_current_fiber() == nullptr; }\n"
    )
    arguments = [str(COMPILER), "-fsanitize=thread", probe, "-o", folder / "probe"]
    if subprocess.run(arguments, capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no ThreadSanitizer that knows fibers")
    if subprocess.run([folder / "probe"], capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer does not run here")
    for name in ("csrc/cuda/host_shim.h", "csrc/cuda/jacobi.cu", "tests/cuda_stress.cpp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def stress(folder: Path) -> subprocess.CompletedProcess[str]:
    source = str(folder / "tests/cuda_stress.cpp")
    program = compiled(folder / "stress", "-O1", "-g", "-fsanitize=thread", "-DSHIM_WARP=4", source)
    return subprocess.run([program], capture_output=True, text=True, check=False)


def test_no_two_threads_of_a_block_race(sanitized: Path) -> None:
    result = stress(sanitized)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_barrier_between_steps_that_is_left_out_is_a_race(sanitized: Path) -> None:
    source = sanitized / "csrc/cuda/jacobi.cu"
    whole = SOURCE.read_text()
    step = whole.index("rotated |= rotate<")
    barrier = whole.index("__syncthreads();", step)
    try:
        source.write_text(whole[:barrier] + whole[barrier + len("__syncthreads();") :])
        result = stress(sanitized)
    finally:
        source.write_text(whole)
    assert result.returncode != 0
    assert "data race" in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_nvcc_compiles_it_without_spills(architecture: str, tmp_path: Path) -> None:
    command = [
        "nvcc",
        "-std=c++17",
        "-cubin",
        f"-arch={architecture}",
        "-Xptxas",
        "-v",
        SOURCE,
        "-o",
        tmp_path / "cubin",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", result.stderr)]
    assert spills == [("0", "0")] * 6
    # What one block of 512 threads may have; of 256 threads a multiprocessor holds four blocks.
    assert len(registers) == 6
    assert max(registers) <= 128
    assert sorted(registers)[3] <= 64

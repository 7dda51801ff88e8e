"""The choice of instruction set: forced, reported, and every one of them right on the whole grid."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from spectral_fast.backends import native_missing
from spectral_fast.environment import describe
from spectral_fast.spectrum import lowrank_svd, rebuild

if native_missing() is not None and os.environ.get("CI") != "true":
    pytest.skip(str(native_missing()), allow_module_level=True)

from spectral_fast import _C

TESTS = Path(__file__).parent
KERNEL_TESTS = (
    "test_native.py",
    "test_batched_svd.py",
    "test_frequent_directions.py",
    "test_head_sketch.py",
    "test_lowrank_svd.py",
    "test_recompose.py",
    "test_segment_products.py",
    "test_spline_kernel.py",
)
USE_A_KERNEL = (
    "import torch; from spectral_fast.spectrum import Spectrum; Spectrum.of(torch.ones(3, 1), torch.ones(1, 3))"
)


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPECTRAL_FAST_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", [isa for isa in _C.isa()["supported"] if isa != _C.isa()["chosen"]])
def test_every_other_instruction_set_of_this_processor_passes_the_kernels_tests(isa: str) -> None:
    files = [str(TESTS / name) for name in KERNEL_TESTS]
    how = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "not gpu and not reference"]
    result = run(isa, "-m", "pytest", *how, *files)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "skipped" not in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("isa", _C.isa()["supported"])
def test_the_forced_instruction_set_is_the_one_in_use(isa: str) -> None:
    result = run(isa, "-c", "from spectral_fast import _C; print(_C.isa()['chosen'])")
    assert result.stdout.strip() == isa


CPUINFO = Path("/proc/cpuinfo")
NEEDS = {
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma"},
    "scalar": {"sse2"},
}


@pytest.mark.skipif(not CPUINFO.exists() or "neon" in _C.isa()["built"], reason="wants Linux's list of x86-64 features")
def test_the_instruction_sets_found_are_those_that_the_operating_system_lists() -> None:
    """A compiler whose runtime answers "no" to every question would leave the slowest kernels, and all tests pass."""
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    assert _C.isa()["supported"] == [isa for isa, needed in NEEDS.items() if needed <= set(flags)]


def test_an_instruction_set_that_the_build_does_not_know_is_an_error() -> None:
    result = run("mmx", "-c", USE_A_KERNEL)
    assert "RuntimeError: SPECTRAL_FAST_ISA=mmx is no instruction set of this build; known: " in result.stderr
    result = run("mmx", "-m", "spectral_fast", "info")
    assert result.returncode == 1
    assert "SPECTRAL_FAST_ISA=mmx is no instruction set of this build" in result.stderr


def test_without_force_the_best_one_is_taken_and_info_tells() -> None:
    result = run("", "-c", "from spectral_fast import _C; print(_C.isa()['chosen'])")
    assert result.stdout.strip() == _C.isa()["supported"][0]
    assert describe()["isa"] == _C.isa()
    last = _C.isa()["supported"][-1]
    assert f"instruction set: {last} (of " in run(last, "-m", "spectral_fast", "info").stdout


def modules() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 64, 500), (40, 3, 700), (300, 64, 500), (1000, 16, 90), (5, 8, 9), (600, 33, 64)] * 4
    bs = [torch.randn(m, r, generator=generator).bfloat16() for m, r, _ in shapes]
    bs[0][:, 3] = 0  # a dead rank: this one takes the QR
    return bs, [torch.randn(r, n, generator=generator).bfloat16() for _, r, n in shapes]


def everything() -> list[torch.Tensor]:
    bs, as_ = modules()
    spectra = lowrank_svd(bs, as_)
    rebuilt = rebuild(spectra, [x.s for x in spectra])
    return [*(x.s for x in spectra), *(x.factored.t_b for x in spectra), *(x for pair in rebuilt for x in pair)]


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_kernels_may_be_called_from_several_python_threads_at_once() -> None:
    wanted = everything()
    results: list[list[torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(everything())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for got in results:
        assert all(torch.equal(x, y) for x, y in zip(wanted, got, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_can_use_the_kernels_after_its_parent_did() -> None:
    """In a process of its own: a child of the test runner would inherit all its threads' locks."""
    script = (
        "import os, torch\n"
        "from spectral_fast.spectrum import lowrank_svd\n"
        "torch.set_num_threads(4)\n"
        "bs, as_ = [torch.randn(400, 64) for _ in range(16)], [torch.randn(64, 400) for _ in range(16)]\n"
        "before = [x.s for x in lowrank_svd(bs, as_)]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    same = all(torch.equal(x, y.s) for x, y in zip(before, lowrank_svd(bs, as_)))\n"
        "    os._exit(0 if same else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0"

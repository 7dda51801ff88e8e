"""Single kernels under pytest-benchmark: ``pytest benchmarks --benchmark-only``; each is checked before it is timed.

``--benchmark-autosave`` and ``--benchmark-compare`` keep runs and compare them; OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import peers
from benchmarks.cases import LLAMA3_70B, SURGERY, Adapter, Cores, Projections
from benchmarks.factors import Factors, core_matrices, projections, with_outputs
from spectral_fast.bench import gate
from spectral_fast.spectrum import lowrank_svd, rebuild

LAYERS = replace(LLAMA3_70B, name="4 layers of Llama-3-70B", layers=4)
ADAPTERS = [
    Adapter(LAYERS, SURGERY, rank, dtype)
    for rank, dtype in [(16, "bfloat16"), (64, "bfloat16"), (64, "float32"), (128, "bfloat16")]
]
CORES = [Cores(560, 16), Cores(560, 64), Cores(40, 256)]


@pytest.fixture(scope="module", params=ADAPTERS, ids=lambda case: f"r{case.rank}-{case.dtype}")
def checked(request: pytest.FixtureRequest) -> Factors:
    """Factors whose spectra and rebuilt factors are right."""
    factors = with_outputs(request.param)
    s = peers.by_reference(factors)
    factors = replace(factors, s_new=[gate.amplified(x) for x in s])
    gate.check_rebuilt(peers.OURS, factors, s, peers.ours(factors))
    return factors


def test_spectra(benchmark: BenchmarkFixture, checked: Factors) -> None:
    """Gram matrices and the SVDs of their cores."""
    benchmark(lowrank_svd, checked.bs, checked.as_)


def test_rebuild(benchmark: BenchmarkFixture, checked: Factors) -> None:
    """Both factors of every module from its spectrum and new singular values."""
    spectra = lowrank_svd(checked.bs, checked.as_)
    benchmark(rebuild, spectra, checked.s_new, checked.outs)


@pytest.mark.parametrize("case", CORES, ids=lambda x: f"{x.count}-of-{x.rank}x{x.rank}")
def test_small_svds(benchmark: BenchmarkFixture, case: Cores) -> None:
    """U, s and Vᵀ of a batch of small matrices."""
    matrices = core_matrices(case)
    gate.check_svd(peers.OURS, matrices, peers.our_svd(matrices))
    benchmark(peers.our_svd, matrices)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sensitivity(benchmark: BenchmarkFixture, dtype: str) -> None:
    """Sums over the tokens of 32 samples, of four modules."""
    pairs, starts = projections(Projections(4, 32, 6400, 64, dtype))
    gate.check_sensitivity(peers.OURS, pairs, starts, peers.our_sensitivity(pairs, starts))
    benchmark(peers.our_sensitivity, pairs, starts)

"""The SVD on a GPU in Triton, under its interpreter where there is none: one program a matrix, and by blocks."""

from __future__ import annotations

import pytest
import torch
from svd_tools import assert_is_svd, hard_matrices, several
from torch import Tensor

from spectral_fast.backends import chosen_backends
from spectral_fast.kernels.batched_svd import batched_svd
from spectral_fast.kernels.gpu import ARCHITECTURES

pytest.importorskip("triton")
from spectral_fast.kernels.batched_svd import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_FAST_BACKEND", "gpu")
    monkeypatch.delenv("SPECTRAL_FAST_CUDA", raising=False)


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix in four blocks of columns: under the interpreter a program costs the same whatever its size."""
    for dtype in (torch.float32, torch.float64):
        monkeypatch.setitem(gpu._WHOLE, dtype, {})
        monkeypatch.setitem(gpu._BLOCKS, dtype, {rank: (rank // 4, 8) for rank in (16, 32, 128, 256)})


def check(x: Tensor) -> None:
    u, s, vh = (y.cpu() for y in batched_svd(x.to(DEVICE)))
    assert chosen_backends()["batched_svd"] == "gpu"
    assert_is_svd(x, u, s, vh)


@pytest.mark.parametrize("r", [1, 2, 3, 15, 16, 17, 33])
def test_ranks_around_the_paddings(r: int) -> None:
    check(several(2 if r < 4 else 1, r, torch.float32))


def nearly_diagonal(r: int) -> Tensor:
    """For which two sweeps are enough."""
    return torch.diag(torch.linspace(1, 0, r))[None] + 1e-5 * several(1, r, torch.float32)


def test_the_largest_rank_that_a_program_holds() -> None:
    check(nearly_diagonal(64))


@pytest.mark.parametrize("r", [5, 16, 18])
def test_float64(r: int) -> None:
    check(several(1, r, torch.float64))


@pytest.mark.parametrize("name", hard_matrices(9))
def test_hard_matrices(name: str) -> None:
    check(hard_matrices(9)[name][None].float())


@pytest.mark.usefixtures("by_blocks")
def test_blocks() -> None:
    check(several(1, 31, torch.float32))


@pytest.mark.usefixtures("by_blocks")
def test_null_vectors_by_blocks() -> None:
    x = several(2, 13, torch.float32)
    x[0] = 0
    x[1, :, 2:7] = 0
    check(x)


@pytest.mark.usefixtures("by_blocks")
def test_ranks_that_no_program_holds() -> None:
    for r in (65, 129):
        check(nearly_diagonal(r))


def test_matrices_of_one_batch_do_not_meet() -> None:
    x = several(3, 3, torch.float32)
    together = batched_svd(x.to(DEVICE))
    for i in range(3):
        for one, all_ in zip(batched_svd(x[i : i + 1].to(DEVICE)), together, strict=True):
            assert torch.equal(one[0], all_[i])


def test_a_transposed_matrix_is_read_by_its_strides() -> None:
    check(several(2, 7, torch.float32).mT)


@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0), (0, 0, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, int, int]) -> None:
    x = torch.empty(shape, device=DEVICE)
    u, s, vh = batched_svd(x)
    assert (u.shape, s.shape, vh.shape) == (shape, shape[:2], shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_is_named(bad: float) -> None:
    x = several(3, 4, torch.float32)
    x[1, 2, 3] = bad
    with pytest.raises(ValueError, match="matrix 1 of x holds a NaN or an infinity"):
        batched_svd(x.to(DEVICE))


@pytest.mark.usefixtures("by_blocks")
def test_a_matrix_that_is_not_finite_is_named_by_blocks() -> None:
    x = torch.eye(4).repeat(2, 1, 1)
    x[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="matrix 1 of x holds a NaN or an infinity"):
        batched_svd(x.to(DEVICE))


def test_a_launch_tells_the_state_of_each_matrix_and_spoils_no_other() -> None:
    x = several(3, 4, torch.float32)
    x[0] = torch.finfo(torch.float32).max
    x[1, 2, 3] = torch.nan
    u, s, vh, status = (y.cpu() for y in gpu.svd_launch(x.to(DEVICE)))
    assert status.tolist() == [gpu.NOT_CONVERGED, gpu.NOT_FINITE, gpu.CONVERGED]
    assert s[1].isnan().all()
    assert_is_svd(x[2:], u[2:], s[2:], vh[2:])


def test_a_singular_value_out_of_range_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="matrix 0 of x did not converge, or a singular value overflows"):
        batched_svd(torch.full((1, 4, 4), torch.finfo(torch.float32).max, device=DEVICE))


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(RuntimeError, match="r is 513, more than 512"):
        batched_svd(torch.empty(1, 513, 513, device=DEVICE))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_shipped_is_what_can_be_launched(arch: str) -> None:
    dtypes = [torch.float32, *([torch.float64] if ARCHITECTURES[arch].float64 else [])]
    shipped = [x.variant for x in gpu.shipped(arch)]
    launched = []
    for dtype in dtypes:
        for rank in sorted({gpu.program_rank(r) for r in range(1, gpu.MAX_RANK + 1)}):
            launched += (
                gpu._whole_variants(arch, dtype, rank)
                if rank in gpu._WHOLE[dtype]
                else [gpu._block_variant(dtype, rank)]
            )
    assert shipped == launched

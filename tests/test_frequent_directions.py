"""The kernel that folds a vector into weighted directions: right, and orthonormal, however close eigenvalues are."""

from __future__ import annotations

import math

import pytest
import torch
from directions_tools import EPS, normal, orthogonality, unit
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends
from spectral_fast.kernels.frequent_directions import frequent_directions


def eigen_cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Values d, descending, and v, for which roots are hard to tell apart or hardly move."""
    n, rand = 24, torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {
        "a graded diagonal": (10 ** (-18 * rand), normal(n)),
        "a graded vector": (rand, 10 ** (-20 * rand.flip(0))),
        "few values, again and again": ((4 * rand).ceil(), normal(n)),
        "values that hardly differ": (1 + 1e-14 * (50 * rand).ceil(), normal(n)),
        "a vector with zeros": (rand, normal(n) * (rand > 0.5)),
        "tiny numbers": (1e-300 * rand, 1e-150 * normal(n)),
        "huge numbers": (1e150 * rand, 1e75 * normal(n)),
        "no vector at all": (rand, torch.zeros(n).double()),
        "one value": (torch.ones(n).double(), normal(n)),
        "a single entry": (rand, torch.eye(n).double()[3]),
    }


@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 5), (3, 3), (7, 9), (8, 16), (16, 64), (33, 70), (64, 512)])
def test_native_and_by_definition_are_one_subspace(k: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for backend in ("cpu", "reference"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        basis, squares, total = torch.zeros(k, m).double(), torch.zeros(k).double(), 0.0
        for z in unit(normal(2 * k + 2, m)):
            basis, squares, removed = frequent_directions(basis, squares, z)
            total += removed
        assert chosen_backends()["frequent_directions"] == backend
        found[backend] = (basis.mT * squares) @ basis, squares, total
    for mine, its in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", eigen_cases())
def test_eigenvectors_are_orthonormal_and_right_however_close_the_values(name: str) -> None:
    d, v = eigen_cases()[name]
    d, n = d.sort(descending=True).values, len(d)
    # All of the space is spanned: the basis becomes the eigenvectors themselves.
    basis, squares, removed = frequent_directions(torch.eye(n).double(), d, v)
    size = max(float(d[0]), float(v @ v))
    assert removed == 0
    assert orthogonality(basis) <= 10 * n * EPS
    exact = d.diag() / size + v[:, None] / math.sqrt(size) * (v / math.sqrt(size))
    assert float(((basis.mT * (squares / size)) @ basis - exact).abs().amax()) <= 10 * n * EPS


@pytest.mark.parametrize("scale", [1e-162, 1e-160, 1e-158, 1e-155, 1e-150, 1.0, 1e150])
def test_directions_are_orthonormal_or_left_out_however_small_or_large_the_vectors(scale: float) -> None:
    basis, squares = torch.zeros(3, 20).double(), torch.zeros(3).double()
    for z in scale * normal(5, 20):
        basis, squares, _ = frequent_directions(basis, squares, z)
    assert int(squares.count_nonzero()) == int(basis.any(1).sum()) == (0 if scale < 1e-154 else 3)
    assert orthogonality(basis) <= 1000 * EPS


@pytest.mark.parametrize(
    ("rank", "k", "m"), [(20, 1, 20), (20, 5, 20), (20, 20, 20), (3, 5, 20), (3, 3, 20), (3, 2, 20), (1, 4, 20)]
)
def test_what_is_missing_is_within_the_bound_for_streams_of_any_rank(rank: int, k: int, m: int) -> None:
    rows = normal(60, rank) @ normal(rank, m, seed=1)
    rows[::7] = 0
    rows[1::7] = rows[2::7][: len(rows[1::7])]
    basis, squares, total = torch.zeros(k, m).double(), torch.zeros(k).double(), 0.0
    for z in rows:
        basis, squares, removed = frequent_directions(basis, squares, z)
        total += removed
    gram = rows.mT @ rows
    rounding = 100 * len(rows) * EPS * float(gram.trace())
    missing = torch.linalg.eigvalsh(gram - (basis.mT * squares) @ basis)
    tails = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)
    assert missing[0] >= -rounding
    assert missing[-1] <= total + rounding
    assert total <= min(float(tails[j:].sum()) / (k + 1 - j) for j in range(k + 1)) + rounding
    assert orthogonality(basis) <= 1000 * EPS
    assert int(squares.count_nonzero()) <= min(rank, k)


def test_the_op_keeps_to_what_it_says_of_itself() -> None:
    basis = torch.eye(3, 5).double()
    squares = torch.tensor([3.0, 2, 1]).double()
    torch.library.opcheck(torch.ops.spectral_fast.frequent_directions.default, (basis, squares, torch.ones(5).double()))


def test_what_is_no_basis_is_refused() -> None:
    basis, squares, z = torch.zeros(2, 4).double(), torch.zeros(2).double(), torch.zeros(4).double()
    with pytest.raises(ValueError, match=r"basis must be \(k, m\).*got \(2, 4\) on cpu, \(2,\) on cpu, \(3,\)"):
        frequent_directions(basis, squares, z[:3])
    with pytest.raises(TypeError, match=r"must be float64, got torch\.float32"):
        frequent_directions(basis.float(), squares, z)

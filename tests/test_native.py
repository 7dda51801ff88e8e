"""The native module: the batched Jacobi SVD against LAPACK, within LAPACK's own test ratio of 30."""

from __future__ import annotations

import os

import numpy as np
import pytest
from numpy.typing import NDArray

try:
    from spectral_fast import _C
except ImportError:
    if os.environ.get("CI") == "true":
        raise  # a build that lost its native module must not pass
    pytest.skip("spectral_fast._C is not built: pip install -e .", allow_module_level=True)

EPS = np.finfo(np.float64).eps
RATIO = 30
SIZES = (1, 2, 3, 7, 8, 9, 17, 64, 67, 130)
Matrix = NDArray[np.float64]


def svd(m: Matrix, threads: int = 1) -> tuple[Matrix, Matrix, Matrix, NDArray[np.int32]]:
    """s, wt, vt and status, from outputs poisoned with NaN."""
    wt, s, vt = np.full_like(m, np.nan), np.full(m.shape[:2], np.nan), np.full_like(m, np.nan)
    status = np.full(len(m), -1, np.int32)
    _C.jacobi_svd(m, wt, s, vt, status, threads)
    return s, wt, vt, status


def kinds(r: int) -> dict[str, Matrix]:
    """Matrices that an adapter's core may be."""
    rng = np.random.default_rng(r)
    plain = rng.standard_normal((r, r))
    repeated, dead = plain.copy(), plain.copy()
    repeated[:, -1] = repeated[:, 0]
    dead[r // 2] = 0
    q, _ = np.linalg.qr(plain)
    p, _ = np.linalg.qr(rng.standard_normal((r, r)))
    return {
        "plain": plain,
        "zero": np.zeros((r, r)),
        "identity": np.eye(r),
        "repeated column": repeated,
        "dead row": dead,
        "rank one": np.outer(plain[0], plain[-1]),
        "condition 1e8": (q * np.logspace(0, -8, r)) @ p,
        "equal singular values": 3 * q,
        "triangular": np.triu(plain),
        "negligible rows": np.where(np.arange(r) == 0, 1.0, 1e-140)[:, None] * plain,
        "almost diagonal": np.diag(np.linspace(1, 2, r)) + 1e-161 * np.triu(plain),
        "huge": plain * 1e300,
        "tiny": plain * 1e-300,
        "subnormal": plain * 1e-310,
    }


@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("kind", kinds(1))
def test_singular_values_and_vectors_are_as_good_as_lapacks(r: int, kind: str) -> None:
    m = kinds(r)[kind]
    (s,), (wt,), (vt,), (status,) = svd(m[None])
    assert status == 0
    assert (np.diff(s) <= 0).all()
    assert (s >= 0).all()
    scale = np.abs(m).max() or 1.0
    m, s = m / scale, s / scale  # keeps the oracle from over- and underflow
    oracle = np.linalg.svd(m, compute_uv=False)
    # A returned s is a multiple of the smallest subnormal number.
    bound = RATIO * r * (EPS + np.finfo(np.float64).smallest_subnormal / scale)
    assert np.abs(s - oracle).max() <= bound * oracle[0]
    assert (wt[s == 0] == 0).all()
    rows = wt[s > 0]
    assert np.linalg.norm(rows @ rows.T - np.eye(len(rows))) <= bound
    assert np.linalg.norm(vt @ vt.T - np.eye(r)) <= bound
    assert np.linalg.norm((wt.T * s) @ vt - m) <= bound * oracle[0]


@pytest.mark.parametrize("r", SIZES)
def test_small_singular_values_keep_their_relative_accuracy_when_rows_are_graded(r: int) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(r).standard_normal((r, r)))
    graded = np.logspace(0, -60, r)
    (s,), _, _, _ = svd((graded[:, None] * q)[None])
    # q is orthogonal to about r roundoffs, and so are the rows: LAPACK's own SVD loses all below 1e-16.
    assert (np.abs(s - graded) <= RATIO * r * EPS * graded).all()


def test_every_matrix_of_a_batch_is_solved_by_itself_whatever_the_number_of_threads() -> None:
    m = np.random.default_rng(0).standard_normal((37, 19, 19))
    one_by_one = [svd(x[None]) for x in m]
    for threads in (1, 2, 3, 8, 64):
        *results, status = svd(m, threads)
        assert (status == 0).all()
        for i, (*alone, _) in enumerate(one_by_one):
            for together, x in zip(results, alone, strict=True):
                assert together[i].tobytes() == x.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_reported_and_its_neighbours_are_solved(bad: float) -> None:
    m = np.random.default_rng(0).standard_normal((3, 5, 5))
    m[1, 4, 4] = bad
    *results, status = svd(m, threads=2)
    assert status.tolist() == [0, 2, 0]
    for x in results:
        assert np.isnan(x[1]).all()
        assert np.isfinite(x[[0, 2]]).all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (0, 0, 0)])
def test_nothing_to_do_is_not_an_error(shape: tuple[int, int, int]) -> None:
    *_, status = svd(np.empty(shape), threads=4)
    assert (status == 0).all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    m, s, status = np.ones((2, 3, 3)), np.ones((2, 3)), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match=r"m must have three axes, got 2"):
        _C.jacobi_svd(m[0], m, s, m.copy(), status, 1)
    with pytest.raises(ValueError, match=r"m must be 2 x 3 x 3, got \(2, 3, 4\)"):
        _C.jacobi_svd(np.ones((2, 3, 4)), m.copy(), s, m.copy(), status, 1)
    with pytest.raises(ValueError, match=r"s must be 2 x 3, got \(3, 2\)"):
        _C.jacobi_svd(m, m.copy(), s.T.copy(), m.copy(), status, 1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        _C.jacobi_svd(m, m.copy(), s, m.copy(), status, 0)
    for wrong in (m.astype(np.float32), m.transpose(0, 2, 1)):
        with pytest.raises(TypeError):
            _C.jacobi_svd(m, wrong, s, m.copy(), status, 1)

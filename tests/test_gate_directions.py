"""Sketches of a stream: how near they are, how they forget, and that they stay orthonormal."""

from __future__ import annotations

import math

import pytest
import torch
from directions_tools import EPS, normal, orthogonality, unit
from torch import Tensor

from spectral_fast.training.gate import FrequentDirections


def folded(rows: Tensor, k: int) -> FrequentDirections:
    sketch = FrequentDirections(rows.shape[1], k)
    for z in rows:
        sketch.update(z)
    return sketch


def streams(m: int) -> dict[str, Tensor]:
    """What is hard: nothing stands out; one direction after the other; decay; what comes once; sudden change."""
    n, eye = 120, torch.eye(m, dtype=torch.float64)
    return {
        "noise": normal(n, m),
        "every direction in turn": eye.repeat(n // m + 1, 1)[:n],
        "a decaying spectrum": normal(n, m) * 0.8 ** torch.arange(m),
        "low rank and noise": normal(n, 3) @ normal(3, m, seed=1) + 0.01 * normal(n, m, seed=2),
        "a change of subspace": torch.cat([normal(n // 2, 4) @ eye[:4], 10 * normal(n // 2, 4, seed=1) @ eye[4:8]]),
        "lengths from 1e-8 to 1e8": normal(n, m) * 10.0 ** (16 * torch.rand(n, 1, dtype=torch.float64) - 8),
        "one vector again and again": eye[:1].expand(n, m).clone(),
        "zeros between": normal(n, m) * (torch.arange(n) % 3 == 0)[:, None],
    }


@pytest.mark.parametrize("name", streams(20))
@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_error_is_below_libertys_bound_on_hard_streams(name: str, k: int) -> None:
    rows = streams(20)[name]
    sketch = folded(rows, k)
    gram = rows.mT @ rows
    total = float(gram.trace())
    missing = torch.linalg.eigvalsh(gram - (sketch.basis.mT * sketch.squares) @ sketch.basis)
    slack = 1e3 * EPS * total  # of the rounding of both Gram matrices
    assert missing[0] >= -slack
    assert missing[-1] <= sketch.error + slack
    tails = torch.linalg.eigvalsh(gram).flip(0)
    for j in range(k + 1):
        assert sketch.error <= tails[j:].sum() / (k + 1 - j) + slack
    assert missing[-1] <= total / k
    assert orthogonality(sketch.basis) <= 1e3 * EPS
    assert (sketch.squares.diff() <= 0).all()


def test_as_long_as_there_is_room_nothing_is_lost() -> None:
    rows = normal(6, 10)
    sketch = folded(torch.cat([rows, rows[:2] + rows[2:4]]), 7)
    assert (sketch.rank, sketch.error) == (6, 0)
    gram = rows.mT @ rows + sum(z[:, None] * z for z in rows[:2] + rows[2:4])
    torch.testing.assert_close((sketch.basis.mT * sketch.squares) @ sketch.basis, gram)


@pytest.mark.parametrize(
    ("mode", "reorth_every", "n"),
    [("liberty", 10**9, 100_000), ("orthonormal", 10**9, 20_000), ("liberty", 16, 1_600), ("orthonormal", 16, 1_600)],
)
def test_the_basis_stays_orthonormal(mode: str, reorth_every: int, n: int) -> None:
    m, k = 24, 6
    sketch = FrequentDirections(m, k, mode, reorth_every)
    for z in unit(normal(n, m) * 0.9 ** torch.arange(m)):
        sketch.update(z)
    assert sketch.updates == n
    assert sketch.rank == k
    # Each update turns the basis by a matrix that is orthogonal to rounding; errors add up, at most, or are taken off.
    assert orthogonality(sketch.basis) <= (k * EPS * n if n > 10**4 else 4 * k * EPS)


@pytest.mark.parametrize("mode", ["liberty", "orthonormal"])
def test_errors_in_the_basis_are_squared_every_so_many_updates(mode: str) -> None:
    sketch = FrequentDirections(24, 6, mode, reorth_every=10)
    rows = unit(normal(20, 24))
    for z in rows[:9]:
        sketch.update(z)
    sketch.basis += 1e-8 * normal(6, 24, seed=1)
    assert orthogonality(sketch.basis) > 1e-8
    sketch.update(rows[9])
    assert orthogonality(sketch.basis) <= 1e3 * EPS


def test_a_direction_just_taken_in_is_half_forgotten_by_the_orthonormal_mode() -> None:
    sketch = FrequentDirections(32, 4, "orthonormal")
    rows = unit(normal(300, 32))
    for i, z in enumerate(rows):
        c = math.sqrt(sketch.captured(z))
        sketch.update(z)
        assert sketch.captured(z) == pytest.approx(1.0 if i < 4 else (1 + c) / 2, abs=1e-12)
    w, z = sketch.basis.mT.clone(), unit(normal(32, seed=5))
    wanted = torch.linalg.svd(torch.cat([w, z[:, None]], 1), full_matrices=False)
    sketch.update(z)
    torch.testing.assert_close(sketch.basis.mT @ sketch.basis, wanted.U[:, :4] @ wanted.U[:, :4].mT)
    c = float((w.mT @ z).norm())
    torch.testing.assert_close(wanted.S**2, torch.tensor([1 + c, 1, 1, 1, 1 - c]).double(), rtol=1e-6, atol=1e-6)


def test_what_is_orthogonal_to_a_full_orthonormal_basis_turns_its_last_direction() -> None:
    sketch = FrequentDirections(5, 2, "orthonormal")
    for z in torch.eye(5).double()[:3]:
        sketch.update(3 * z)
    half = math.sqrt(0.5)
    torch.testing.assert_close(sketch.basis[:, :3], torch.tensor([[1, 0, 0], [0, half, half]]).double())
    sketch.update(sketch.basis[0])  # within the span already: nothing changes
    assert sketch.captured(torch.eye(5).double()[0]) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("mode", ["liberty", "orthonormal"])
def test_a_sketch_goes_on_from_its_state_and_forgets_on_reset(mode: str) -> None:
    rows = unit(normal(40, 12))
    whole, begun, later = (FrequentDirections(12, 3, mode, 8) for _ in range(3))
    for z in rows:
        whole.update(z)
    for z in rows[:20]:
        begun.update(z)
    state = begun.state_dict()
    begun.update(rows[0])
    later.load_state_dict(state)
    for z in rows[20:]:
        later.update(z)
    assert torch.equal(whole.basis, later.basis)
    assert (whole.error, whole.updates) == (later.error, later.updates)
    later.reset()
    assert (later.rank, later.error, later.updates, later.captured(rows[0])) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"k = 4, m = 12 cannot go on from \(3, 12\)"):
        FrequentDirections(12, 4, mode).load_state_dict(state)


def test_bad_vectors_and_sizes_are_refused() -> None:
    for mode in ("liberty", "orthonormal"):
        sketch = FrequentDirections(4, 2, mode)
        sketch.update(torch.zeros(4))
        assert (sketch.rank, sketch.updates) == (0, 1)
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match="NaN or an infinity"):
                sketch.update(torch.tensor([1.0, bad, 0, 0]))
        with pytest.raises(ValueError, match=r"a vector must be \(4,\), got \(5,\)"):
            sketch.update(torch.ones(5))
    with pytest.raises(ValueError, match="wanted 1 <= k <= m"):
        FrequentDirections(4, 5)
    with pytest.raises(ValueError, match="fd_mode must be one of liberty, orthonormal; got 'fast'"):
        FrequentDirections(4, 2, "fast")

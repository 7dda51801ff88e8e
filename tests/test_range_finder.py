"""The leading directions of a matrix in blocks: near the best, and what they miss is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from extract_tools import randn
from torch import Tensor

from spectral_fast.toolbox.extraction.range_finder import project


def blocks(d: Tensor, step: int = 7) -> Callable[[], Iterator[tuple[int, Tensor]]]:
    return lambda: ((i, d[i : i + step]) for i in range(0, len(d), step))


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_space_holds_nearly_what_the_best_would_and_what_it_misses_is_told(
    shape: tuple[int, int], decay: float
) -> None:
    u, _, vh = torch.linalg.svd(randn(*shape), full_matrices=False)
    s = torch.arange(1, 61) ** -decay
    d = (u * s) @ vh
    all_missed = []
    for passes in (1, 2, 4):
        found = project(blocks(d), shape, 20, passes, torch.Generator().manual_seed(0))
        assert found is not None
        missed = (d.double() - found.y.double() @ found.q.double()).square().sum().item()
        assert found.energy == pytest.approx(d.double().square().sum().item(), rel=1e-6)
        assert found.missed == pytest.approx(missed, rel=0.02 if missed > 1e-4 * found.energy else 0.5)
        torch.testing.assert_close(found.q @ found.q.mT, torch.eye(20), rtol=0, atol=1e-5)
        all_missed.append(missed)
    # The mean without any pass (Halko et al., theorem 10.5, k = 12 of 20 columns): 1 + k / (20 - k - 1) of the best.
    assert all_missed[0] <= (1 + 12 / 7) * s[12:].double().square().sum().item()
    assert all_missed[0] > all_missed[1] > all_missed[2] >= s[20:].double().square().sum().item() * (1 - 1e-5)


def test_a_small_error_is_estimated_by_probes_where_the_sums_cancel() -> None:
    d = randn(200, 5) @ randn(5, 150, seed=1) + 1e-3 * randn(200, 150, seed=2)
    found = project(blocks(d), (200, 150), 20, 2, torch.Generator().manual_seed(0))
    assert found is not None
    missed = (d.double() - found.y.double() @ found.q.double()).square().sum().item()
    assert missed < 1e-4 * found.energy
    # A mean of eight squares of noise of full rank: its relative deviation is some √(2 / (8 · 100)).
    assert found.missed == pytest.approx(missed, rel=0.25)


def test_small_matrices_are_taken_whole_and_zeros_are_none() -> None:
    for shape in ((5, 40), (40, 5), (1, 1)):
        d = randn(*shape)
        found = project(blocks(d), shape, 8, 2, torch.Generator())
        assert found is not None
        assert found.missed == 0
        torch.testing.assert_close(found.y @ found.q, d, rtol=0, atol=1e-5)
        assert project(blocks(0 * d), shape, 8, 2, torch.Generator()) is None
    assert project(blocks(torch.zeros(50, 40)), (50, 40), 8, 2, torch.Generator()) is None


@pytest.mark.parametrize("columns", [8, 50])
def test_values_that_are_not_finite_are_refused(columns: int) -> None:
    d = randn(50, 40)
    d[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        project(blocks(d), (50, 40), columns, 2, torch.Generator())


def test_directions_that_were_found_before_are_begun_with() -> None:
    d = randn(90, 60)  # a flat spectrum, of which one pass finds little
    good = project(blocks(d), (90, 60), 12, 20, torch.Generator().manual_seed(0))
    assert good is not None
    missed = []
    for start in (None, good.q):
        found = project(blocks(d), (90, 60), 14, 1, torch.Generator().manual_seed(1), start=start)
        assert found is not None
        missed.append(found.missed)
    assert missed[1] <= good.missed < missed[0]

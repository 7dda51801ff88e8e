"""The Marchenko-Pastur edge on Gaussian matrices: nothing is found in noise, and what is planted is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectral_fast.allocation.bulk import SIGMAS, fit_bulk
from spectral_fast.allocation.tail import Floats

SIDES = [(64, 64), (64, 96), (48, 192), (24, 288)]
MATRICES = 200


def noise(m: int, n: int, count: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, m, n, dtype=torch.float64, generator=generator)


def spectra_of(w: torch.Tensor) -> Floats:
    found: Floats = torch.linalg.eigvalsh(w @ w.mT).numpy()
    return found


@pytest.mark.parametrize(("m", "n"), SIDES)
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("sigma_method", SIGMAS)
def test_noise_of_any_shape_and_scale_has_spikes_in_at_most_5_percent_of_matrices(
    m: int, n: int, scale: float, sigma_method: str
) -> None:
    count = MATRICES if sigma_method != "kde" else 40
    found = [
        (eigs > fit_bulk(eigs, m, n, sigma_method=sigma_method).edge).any()
        for eigs in spectra_of(noise(m, n, count, scale))
    ]
    assert np.mean(found) <= 0.05


@pytest.mark.parametrize(("m", "n"), SIDES)
def test_johnstones_edge_is_the_95_percent_quantile_of_the_largest_eigenvalue(m: int, n: int) -> None:
    spectra = spectra_of(noise(m, n, MATRICES, seed=1))
    beyond = sum((eigs > fit_bulk(eigs, m, n, tw_method="johnstone").edge).any() for eigs in spectra)
    # 10 of 200 are expected, with a deviation of 3.1; fewer as an estimated variance follows a large eigenvalue.
    assert 1 <= beyond <= 10 + 4 * 3.1


@pytest.mark.parametrize(("m", "n"), SIDES)
@pytest.mark.parametrize("tw_method", ["ww", "johnstone"])
@pytest.mark.parametrize("sigma_method", ["mean", "median"])
def test_planted_spikes_are_found_and_none_besides(m: int, n: int, tw_method: str, sigma_method: str) -> None:
    w = noise(m, n, 20, seed=2)
    u, v = (torch.linalg.qr(noise(side, 3, 20, seed=side)).Q for side in (m, n))
    # Twice the largest singular value of the noise: far beyond the transition at (m n)^(1/4).
    strength = 2 * (m**0.5 + n**0.5) * torch.tensor([1.0, 1.2, 1.5], dtype=torch.float64)
    planted = spectra_of(w + (u * strength) @ v.mT)
    counts = [
        int((eigs > fit_bulk(eigs, m, n, sigma_method=sigma_method, tw_method=tw_method).edge).sum())
        for eigs in planted
    ]
    # At most one matrix in 20 by chance, where the edge is a 95 % quantile.
    assert sum(count != 3 for count in counts) <= (3 if tw_method == "johnstone" else 0)


@pytest.mark.parametrize("sigma_method", SIGMAS)
@pytest.mark.parametrize(("m", "n"), SIDES)
def test_the_variance_of_noise_is_estimated(sigma_method: str, m: int, n: int) -> None:
    eigs = spectra_of(noise(m, n, 30, scale=0.3, seed=3))
    sigmas = np.array([fit_bulk(x, m, n, sigma_method=sigma_method).sigma for x in eigs])
    # The grid of kde is 1 % of the sigma that the largest eigenvalue gives; its kernel blurs both ends, more where
    # eigenvalues are few.
    assert np.median(sigmas) == pytest.approx(0.3 * np.sqrt(n), rel=0.06 if sigma_method == "kde" else 0.02)


def test_spikes_move_the_mean_but_hardly_the_median() -> None:
    m, n = 64, 96
    eigs = spectra_of(noise(m, n, 1, seed=4))[0]
    spiked = np.sort(np.append(eigs[3:], [50 * n, 60 * n, 70 * n]))
    by_mean, by_median = (fit_bulk(spiked, m, n, sigma_method=name).sigma for name in ("mean", "median"))
    assert by_mean > 1.5 * np.sqrt(n)
    assert by_median == pytest.approx(np.sqrt(n), rel=0.1)


def test_the_edge_scales_with_the_eigenvalues_only_if_they_are_rescaled() -> None:
    eigs = spectra_of(noise(64, 96, 1, seed=5))[0]
    small = eigs * 1e-4
    assert fit_bulk(small, 64, 96).edge == pytest.approx(1e-4 * fit_bulk(eigs, 64, 96).edge, rel=1e-12)
    assert fit_bulk(small, 64, 96, rescale=False).edge > 3e-4 * fit_bulk(eigs, 64, 96, rescale=False).edge


def test_without_tracy_widom_the_edge_is_the_end_of_the_bulk() -> None:
    eigs = spectra_of(noise(48, 192, 1, seed=6))[0]
    bulk = fit_bulk(eigs, 48, 192, tracy_widom=False)
    assert bulk.edge == pytest.approx(bulk.ends[1], rel=1e-12)
    assert bulk.edge == pytest.approx(eigs.mean() * (1 + 48**0.5 / 192**0.5) ** 2, rel=1e-12)


@pytest.mark.parametrize("q", [1.0, 1.5, 4.0])
def test_the_density_integrates_to_one_with_the_mean_that_sigma_gives(q: float) -> None:
    bulk = fit_bulk(np.array([2.0, 2.0]), 100, int(100 * q), tracy_widom=False)
    a, b = bulk.ends
    angle = np.linspace(0, np.pi, 100001)[1:-1]
    x = (a + b) / 2 - (b - a) / 2 * np.cos(angle)
    weights = bulk.density(x) * np.sin(angle) * (b - a) / 2 * (angle[1] - angle[0])
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    assert (x * weights).sum() == pytest.approx(2, abs=2e-3)

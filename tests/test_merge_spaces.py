"""Merging in subspaces: core space, KnOTS and task singular vectors beside their definitions on dense matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import files
from merge_tools import (
    layer_adapter,
    merge,
    peft_adapter,
    random_factors,
    relative,
    three_adapters,
    update,
    weighted_sum,
)

from spectral_fast.toolbox.merging import METHODS

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return three_adapters(tmp_path)


def dense_core(deltas: list[torch.Tensor], bs: list[torch.Tensor], as_: list[torch.Tensor]) -> tuple[Any, ...]:
    u = torch.linalg.svd(torch.cat(bs, 1), full_matrices=False)[0]
    vh = torch.linalg.svd(torch.cat(as_), full_matrices=False)[2]
    return [u.mT @ delta @ vh.mT for delta in deltas], lambda core: u @ core @ vh


def dense_knots(deltas: list[torch.Tensor], *_: Any) -> tuple[Any, ...]:
    u, s, vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    k = int((s > 1e-5).sum())
    parts = (s[:k, None] * vh[:k]).split(deltas[0].shape[1], 1)
    return list(parts), lambda core: u[:, :k] @ core


def ties(matrices: list[torch.Tensor], weights: list[float], density: float, majority_sign: str) -> torch.Tensor:
    """Written entry by entry."""
    trimmed = []
    for x in matrices:
        least = x.abs().flatten().sort(descending=True).values[int(density * x.numel()) - 1]
        trimmed.append(torch.where(x.abs() >= least, x, 0))
    out = torch.zeros_like(matrices[0])
    for index in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        values = [(float(x[tuple(index)]), weight) for x, weight in zip(trimmed, weights, strict=True)]
        total = sum(x for x, _ in values)
        votes = sum((x > 0) - (x < 0) for x, _ in values) if majority_sign == "frequency" else total
        sign = 1 if (votes or total) >= 0 else -1
        agree = [x * weight for x, weight in values if x * sign > 0]
        out[tuple(index)] = sum(agree) / max(len(agree), 1)
    return out


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize(("m", "n"), [(14, 11), (4, 11), (14, 4)])  # of 5 directions together, or 4
@pytest.mark.parametrize(("method", "space"), [("core_ties", dense_core), ("knots", dense_knots)])
def test_ties_in_a_subspace_is_that_of_its_definition_on_dense_matrices(
    tmp_path: Path, method: str, space: Any, m: int, n: int, majority_sign: str
) -> None:
    factors = [random_factors(m, n, r, seed) for seed, r in enumerate((3, 2))]
    weights, alphas = [0.7, -0.4], [6, 5]
    folders = [
        layer_adapter(tmp_path / str(i), {"x.q": pair}, r=len(pair[1]), lora_alpha=alpha)
        for i, (pair, alpha) in enumerate(zip(factors, alphas, strict=True))
    ]
    [module] = merge(folders, weights, tmp_path / "out", method=method, majority_sign=majority_sign).values()
    deltas = [update(folder)["base_model.model.x.q"] for folder in folders]
    matrices, back = space(deltas, [b.double() for b, _ in factors], [a.double() for _, a in factors])
    wanted = back(ties(matrices, weights, 0.5, majority_sign))
    assert relative(update(tmp_path / "out")["base_model.model.x.q"], wanted) < 64 * EPS
    assert module.r == min(5, m, n)
    assert 0 < module.agreement < 1


@pytest.mark.parametrize("method", ["core_dare", "core_dare_ties", "knots_dare"])
def test_random_masks_follow_from_the_seed_alone(tmp_path: Path, three: list[Path], method: str) -> None:
    weights = [1.0, 0.5, -0.3]
    before = torch.get_num_threads()
    try:
        for name, threads, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
            torch.set_num_threads(threads)
            merge(three, weights, tmp_path / name, method=method, seed=seed)
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    one, other = update(tmp_path / "one"), update(tmp_path / "other")
    assert all(relative(other[name], one[name]) > 0.01 for name in one)


@pytest.mark.parametrize("method", ["core_dare", "core_ties", "knots", "knots_dare"])
def test_with_all_entries_of_one_adapter_a_subspace_loses_nothing(tmp_path: Path, method: str) -> None:
    source = peft_adapter(tmp_path / "a", 1)
    merge([source], [0.5], tmp_path / "out", method=method, density=1.0)
    wanted, got = weighted_sum([source], [0.5]), update(tmp_path / "out")
    assert max(relative(got[name], wanted[name]) for name in wanted) < 64 * EPS


def test_the_unsparsified_core_is_the_sum(tmp_path: Path, three: list[Path]) -> None:
    merge(three, [1.0, 0.5, -0.3], tmp_path / "out", method="core_dare", density=1.0)
    wanted, got = weighted_sum(three, [1.0, 0.5, -0.3]), update(tmp_path / "out")
    assert max(relative(got[name], wanted[name]) for name in wanted) < 64 * EPS


@pytest.mark.parametrize(
    ("n", "density", "kept"),
    [(11, None, [3, 2, 0]), (11, 0.4, [2, 1, 0]), (4, None, [1, 1, 0])],  # the third has B = 0; 4 // 3 fit into 4
    ids=["all", "a share", "as many as fit"],
)
def test_task_singular_vectors_are_made_orthogonal(
    tmp_path: Path, n: int, density: float | None, kept: list[int]
) -> None:
    factors = [random_factors(14, n, r, seed) for seed, r in enumerate((3, 2, 2))]
    factors[2] = (0 * factors[2][0], factors[2][1])
    folders = [layer_adapter(tmp_path / str(i), {"q": pair}, r=len(pair[1])) for i, pair in enumerate(factors)]
    weights = [1.0, 0.5, 1.0]
    merge(folders, weights, tmp_path / "out", method="tsv", density=density)
    us, ss, vhs = zip(
        *(torch.linalg.svd(update(x)["base_model.model.q"], full_matrices=False) for x in folders), strict=True
    )
    nearest = []
    for side in (
        [u[:, :k] for u, k in zip(us, kept, strict=True)],
        [v[:k].mT for v, k in zip(vhs, kept, strict=True)],
    ):
        p, _, qh = torch.linalg.svd(torch.cat(side, 1), full_matrices=False)
        nearest.append(p @ qh)
    values = torch.cat([weight * s[:k] for weight, s, k in zip(weights, ss, kept, strict=True)])
    wanted = (nearest[0] * values) @ nearest[1].mT
    assert relative(update(tmp_path / "out")["base_model.model.q"], wanted) < 64 * EPS


def test_task_singular_vectors_of_twins_are_shared(tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "a", 1)
    merge([source, source], [0.5, 0.5], tmp_path / "out", method="tsv")
    wanted, got = update(source), update(tmp_path / "out")
    # P = Q = [U U] / √2 of 2 r columns that span r dimensions: each half gives half of w ΔW.
    assert max(relative(got[name], 0.5 * wanted[name]) for name in wanted) < 64 * EPS


@pytest.mark.parametrize("method", METHODS)
def test_twins_count_twice_or_where_signs_are_elected_on_average(tmp_path: Path, method: str) -> None:
    source = peft_adapter(tmp_path / "a", 1)
    how = METHODS[method]
    merge([source, source], [0.5, 0.5], tmp_path / "out", method=method, **({"density": 1.0} if how.sparsify else {}))
    # (2 √0.5 B) (2 √0.5 A), unless the mean of both is taken; tsv gives the mean, too, see above.
    times = 0.5 if how.elect or method == "tsv" else 2.0 if how.space == "factors" else 1.0
    wanted, got = update(source), update(tmp_path / "out")
    assert max(relative(got[name], times * wanted[name]) for name in wanted) < 64 * EPS

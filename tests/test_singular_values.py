"""Singular values alone, by the short way and by the long one, against the dense product in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from spectral_fast.kernels.lowrank_svd import cpu, singular_values

EPS32 = torch.finfo(torch.float32).eps


def dense(b: Tensor, a: Tensor) -> Tensor:
    s = torch.linalg.svdvals(b.double() @ a.double())[: b.shape[1]]
    return torch.nn.functional.pad(s, (0, b.shape[1] - len(s)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decades", [0, 2, 4, 7])
def test_they_are_within_the_contract_of_the_svd(dtype: torch.dtype, decades: int) -> None:
    generator = torch.Generator().manual_seed(decades)
    pairs = []
    for r in (1, 2, 7, 8, 33, 130):
        for m, n in ((1, 5), (3, 257), (64, 40), (300, 257)):
            b = torch.randn(m, r, generator=generator) * torch.logspace(0, -decades, r)
            pairs.append((b.to(dtype), torch.randn(r, n, generator=generator).to(dtype)))
    found = singular_values(*map(list, zip(*pairs, strict=True)))
    for (b, a), s in zip(pairs, found, strict=True):
        true = dense(b, a)
        assert (s - true).abs().max() <= 30 * len(s) * EPS32 * true[0]
        assert (s[1:] <= s[:-1]).all()
        assert (s >= 0).all()


def test_the_long_way_is_taken_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    full = cpu.lowrank_svd

    def spy(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str]) -> list[object]:
        taken.extend(names)
        return list(full(bs, as_, names))

    monkeypatch.setattr(cpu, "lowrank_svd", spy)
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(400, 32, generator=generator), torch.randn(32, 300, generator=generator)
    dead, cancels = b.clone(), torch.cat([a[:16], -a[:16]])
    dead[:, 5] = 0
    modules = {
        "plain": (b, a),
        "steep": (b * torch.logspace(0, -5, 32), a),
        "B = 0": (0 * b, a),
        "dead column": (dead, a),
        "dead row": (b, dead[:300].mT.contiguous()),
        "cancels": (torch.cat([b[:, :16], b[:, :16] * (1 + 1e-6)], 1), cancels),
        "double": (b.double(), a.double()),
    }
    found = singular_values(*map(list, zip(*modules.values(), strict=True)), list(modules))
    assert set(taken) == {"B = 0", "dead column", "cancels", "double"}
    for (name, pair), s in zip(modules.items(), found, strict=True):
        true = dense(*pair)
        scale = max(float(true[0]), 1e-300)
        assert (s - true).abs().max() <= 30 * 32 * EPS32 * scale, name
    assert found[2].tolist() == [0.0] * 32
    assert found[4][-1] < 1e-6 * found[4][0]


def test_what_is_not_finite_is_named_and_the_reference_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    b, a = torch.randn(40, 8), torch.randn(8, 30)
    [ours] = singular_values([b], [a])
    with pytest.raises(ValueError, match="here: A holds a NaN or an infinity"):
        singular_values([b, b], [a, a * torch.inf], ["there", "here"])
    with pytest.raises(ValueError, match="share r"):
        singular_values([b], [a[:7]])
    monkeypatch.setenv("SPECTRAL_FAST_BACKEND", "reference")
    [reference] = singular_values([b], [a])
    assert (ours - reference).abs().max() <= 1e-6 * reference[0]

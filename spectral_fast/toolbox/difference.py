"""What two adapters have in common: their updates compared module by module, from the factors alone.

ΔW₁ − ΔW₂ = B A with B = [scaling₁ B₁, −scaling₂ B₂] and A = [A₁; A₂], and ‖B A‖_F² = Σ BᵀB ⊙ AAᵀ, whose blocks are
‖ΔW₁‖², −⟨ΔW₁, ΔW₂⟩ (twice) and ‖ΔW₂‖². Where that cancels, the norm is taken of R_B R_Aᵀ from two QR instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.kernels.lowrank_svd import Factored
from spectral_fast.spectrum import lowrank_svd
from spectral_fast.toolbox import measures
from spectral_fast.toolbox.streaming import Batch, Factors, Progress, streamed

# Of the squares that are summed in float64: below it, fewer than four digits of the difference are left.
CANCELS = 1e-10


@dataclass(frozen=True)
class ModuleDifference:
    """Two updates of one module.

    Attributes:
        relative: ‖ΔW₁ − ΔW₂‖_F / max(‖ΔW₁‖_F, ‖ΔW₂‖_F), 0 to 2; 0 where both are zero.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖_F ‖ΔW₂‖_F); None where one is zero.
        norms: ‖ΔW₁‖_F and ‖ΔW₂‖_F, scaling included.
        overlap_u: mean squared cosine of the principal angles between the spans of the first `directions` left
            singular vectors, 0 to 1, by chance directions / m; None where one update is zero.
        overlap_v: the same on the right, by chance directions / n.
        directions: how many were compared.
        ranks: r of each.
        scalings: of each.
        dtypes: as stored.
    """

    relative: float
    cosine: float | None
    norms: tuple[float, float]
    overlap_u: float | None
    overlap_v: float | None
    directions: int
    ranks: tuple[int, int]
    scalings: tuple[float, float]
    dtypes: tuple[str, str]


@dataclass(frozen=True)
class Difference:
    """Two adapters.

    Attributes:
        modules: name -> its two updates, of the modules that both have.
        only: names of modules that only the first has, and that only the second has.
        shapes: name -> (m, n) of each, of modules whose updates cannot be compared.
        others: tensors beside those modules (DoRA's magnitudes, biases, modules_to_save) that are not the same in
            both, bit for bit.
        config: key of adapter_config.json -> its two values, where they differ.
    """

    modules: Mapping[str, ModuleDifference]
    only: tuple[list[str], list[str]]
    shapes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    others: list[str]
    config: Mapping[str, tuple[Any, Any]]

    def beyond(self, at_most: float) -> list[str]:
        """Modules that differ by more than that, cannot be compared, or are in one adapter only; and other tensors.

        Raises:
            ValueError: at_most is no number from 0 on.
        """
        if not at_most >= 0:
            raise ValueError(f"at_most must be at least 0; got {at_most}")
        far = [name for name, x in self.modules.items() if x.relative > at_most]
        return [*far, *self.shapes, *self.only[0], *self.only[1], *self.others]


def compare_adapters(
    first: Adapter,
    second: Adapter,
    *,
    modules: tuple[list[LoraModule], list[LoraModule]] | None = None,
    directions: int = 8,
    progress: Progress = iter,
) -> Difference:
    """Compare the updates of two adapters; nothing of size m × n is formed.

    Args:
        first: an adapter, opened.
        second: another one.
        modules: which of each; by default all that can be edited.
        directions: how many of the largest singular directions the overlaps are of; fewer where the rank is smaller.
        progress: wraps the list of modules.

    Returns:
        What differs: module by module, in other tensors, and in the configurations.

    Raises:
        ValueError: factors that are not finite, named; directions below 1.

    Example:
        >>> from spectral_fast import Adapter, embedded
        >>> from spectral_fast.toolbox import compare_adapters
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> difference = compare_adapters(adapter, adapter)
        >>> {module.relative for module in difference.modules.values()}, difference.config
        ({0.0}, {})
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1; got {directions}")
    ones, others = ({x.name: x for x in side} for side in modules or (first.modules.values(), second.modules.values()))
    shapes = {name: ((x.m, x.n), (y.m, y.n)) for name, x in ones.items() if (y := others.get(name))}
    common = [x for name, x in ones.items() if name in shapes and shapes[name][0] == shapes[name][1]]

    def compare(batch: Batch, factors: Factors) -> list[tuple[str, ModuleDifference]]:
        pairs = [*factors, *(second.read(others[module.name]) for module in batch)]
        names = [f"{module.name} of {adapter.path}" for adapter in (first, second) for module in batch]
        bs, as_ = map(list, zip(*pairs, strict=True))
        spectra = [x.factored for x in lowrank_svd(bs, as_, names)]
        count = len(batch)
        return [
            (
                x.name,
                _compared(
                    (x, others[x.name]), (pairs[i], pairs[count + i]), (spectra[i], spectra[count + i]), directions
                ),
            )
            for i, x in enumerate(batch)
        ]

    with streamed(first, common, compare, progress) as results:
        found = {name: x for batch in results for name, x in batch}
    return Difference(
        found,
        ([name for name in ones if name not in others], [name for name in others if name not in ones]),
        {name: shape for name, shape in shapes.items() if shape[0] != shape[1]},
        _differing_others(first, second),
        {
            key: (first.config.get(key), second.config.get(key))
            for key in sorted(first.config.keys() | second.config.keys())
            if first.config.get(key) != second.config.get(key)
        },
    )


def _differing_others(first: Adapter, second: Adapter) -> list[str]:
    """Tensors that belong to no editable module, and that are not the same in both."""
    factors = {key for adapter in (first, second) for x in adapter.modules.values() for key in (x.b_key, x.a_key)}
    ours, theirs = first.weights.tensors, second.weights.tensors
    return [
        key
        for key in (*ours, *(key for key in theirs if key not in ours))
        if key not in factors
        and (ours.get(key) != theirs.get(key) or not _same_bits(first.weights.read(key), second.weights.read(key)))
    ]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


_Pair = tuple[Tensor, Tensor]


def _compared(
    modules: tuple[LoraModule, LoraModule], factors: tuple[_Pair, _Pair], spectra: tuple[Factored, Factored], top: int
) -> ModuleDifference:
    x, y = modules
    (b, a), (d, c) = factors
    tall = torch.cat([x.scaling * b.double(), -y.scaling * d.double()], 1)
    flat = torch.cat([a.double(), c.double()])
    gram_b, gram_a = tall.mT @ tall, flat @ flat.mT
    both = gram_b * gram_a
    norms = math.sqrt(max(0.0, float(both[: x.r, : x.r].sum()))), math.sqrt(max(0.0, float(both[x.r :, x.r :].sum())))
    cosine = None
    if all(norms):
        cosine = max(-1.0, min(1.0, -float(both[: x.r, x.r :].sum()) / (norms[0] * norms[1])))
    squared = float(both.sum())
    if x.scaling == y.scaling and b.dtype == d.dtype and torch.equal(b, d) and torch.equal(a, c):
        squared = 0.0
    elif squared < CANCELS * float(gram_b.trace() * gram_a.trace()):
        r_b, r_a = torch.linalg.qr(tall, mode="r").R, torch.linalg.qr(flat.mT, mode="r").R
        squared = float((r_b @ r_a.mT).square().sum())
    one, other = spectra
    k = min(top, len(measures.nonzero(one.s.numpy())), len(measures.nonzero(other.s.numpy())))
    return ModuleDifference(
        math.sqrt(squared) / max(norms) if any(norms) else 0.0,
        cosine,
        norms,
        _overlap(one.basis_b.mT, one.t_b, other.basis_b.mT, other.t_b, k) if k else None,
        _overlap(one.basis_a, one.t_a, other.basis_a, other.t_a, k) if k else None,
        k,
        (x.r, y.r),
        (x.scaling, y.scaling),
        (str(x.dtype).removeprefix("torch."), str(y.dtype).removeprefix("torch.")),
    )


def _overlap(one: Tensor, t: Tensor, other: Tensor, w: Tensor, k: int) -> float:
    """‖X_kᵀ Y_k‖_F² / k of X = oneᵀ t and Y = otherᵀ w, whose columns are orthonormal."""
    cosines = t[:, :k].mT @ (one.double() @ other.double().mT) @ w[:, :k]
    return min(1.0, float(cosines.square().sum()) / k)

"""The ways of merging, and what each may be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

from spectral_fast.options import check, option

DTYPES = ("float32", "bfloat16", "float16")  # by torch's names


class Method(NamedTuple):
    """A way of merging: what is combined, entry by entry, and how.

    Attributes:
        space: "cat" and "sum" for Σ w s B A as it is; else the matrices of each adapter that are combined: "factors"
            for B and A apart, "dense" for s B A, "core" and "knots" for coordinates in common bases, "tsv".
        sparsify: "magnitude" for the largest entries of each matrix, "random" for a drawing of them, rescaled;
            None for all.
        elect: each entry is the mean of those adapters' that have the majority's sign, instead of the sum of all.
    """

    space: str
    sparsify: str | None = None
    elect: bool = False


METHODS = {
    "cat": Method("cat"),
    "svd": Method("sum"),
    "linear": Method("factors"),
    "ties": Method("factors", "magnitude", elect=True),
    "dare_linear": Method("factors", "random"),
    "dare_ties": Method("factors", "random", elect=True),
    "magnitude_prune": Method("factors", "magnitude"),
    "ties_svd": Method("dense", "magnitude", elect=True),
    "dare_linear_svd": Method("dense", "random"),
    "dare_ties_svd": Method("dense", "random", elect=True),
    "magnitude_prune_svd": Method("dense", "magnitude"),
    "core_ties": Method("core", "magnitude", elect=True),
    "core_dare": Method("core", "random"),
    "core_dare_ties": Method("core", "random", elect=True),
    "knots": Method("knots", "magnitude", elect=True),
    "knots_dare": Method("knots", "random", elect=True),
    "tsv": Method("tsv"),
}


@dataclass(frozen=True)
class MergeOptions:
    """How adapters are merged.

    Example:
        >>> from spectral_fast.toolbox import MergeOptions
        >>> MergeOptions(method="svd", rank=16).rank
        16
        >>> MergeOptions(method="mean")
        Traceback (most recent call last):
            ...
        ValueError: method must be one of cat, svd, linear, ...; got 'mean'
    """

    method: str = option(
        "svd",
        "cat: exact, the ranks add up; svd: the same, truncated; linear to magnitude_prune: on B and A, of equal "
        "ranks; ..._svd: on the dense s B A, slow; core_..., knots...: in common bases of all adapters; tsv: singular "
        "vectors made orthogonal",
        choices=tuple(METHODS),
    )
    density: float | None = option(
        None, "share of the entries that ties, dare and magnitude_prune keep; with tsv of the directions", low=0, high=1
    )
    majority_sign: str = option(
        "total", "whose sign has the majority: that of the sum, or the more frequent", choices=("total", "frequency")
    )
    rank: int | None = option(
        None, "rank of the result", low=1, shown="with svd and ..._svd the largest of the sources, else all there is"
    )
    energy: float | None = option(None, "smallest ranks that keep this share of each module's sum of s²", low=0, high=1)
    error: float | None = option(
        None, "smallest ranks with |ΔW - ΔW'| / |ΔW| up to this in each module, Frobenius norms", low=0, high=1
    )
    seed: int = option(0, "seed of the random drawings of dare")
    dtype: str | None = option(None, "dtype to store", choices=DTYPES, shown="that of the sources, or the wider")

    def __post_init__(self) -> None:
        check(self)
        goals = {name: value for name, value in asdict(self).items() if name in ("rank", "energy", "error")}
        goals = {name: value for name, value in goals.items() if value is not None}
        if len(goals) > 1:
            raise ValueError(f"give one of rank, energy and error; got {' and '.join(goals)}")
        if goals and self.how.space in ("cat", "factors"):
            raise ValueError(
                f"{next(iter(goals))} is not for {self.method}, whose rank is the sources'; take svd or core_ties"
            )
        if self.how.sparsify and not self.density:
            raise ValueError(f"{self.method} keeps a share of entries: give density, above 0 and up to 1, such as 0.5")
        if self.density is not None and not (self.how.sparsify or (self.how.space == "tsv" and self.density)):
            raise ValueError(f"density is not for {self.method}, which keeps all entries; got {self.density}")

    @property
    def how(self) -> Method:
        """What the method's name stands for."""
        return METHODS[self.method]

    @property
    def share_lost(self) -> float | None:
        """Of Σ s² of each module, what may be lost, if ranks follow from that."""
        if self.error is not None:
            return self.error**2
        return None if self.energy is None else 1 - self.energy

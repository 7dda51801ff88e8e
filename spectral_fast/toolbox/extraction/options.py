"""What an extraction may be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectral_fast.options import check, option

if TYPE_CHECKING:
    from torch import Tensor

    from spectral_fast.toolbox.extraction.range_finder import Projection

DTYPES = ("float32", "bfloat16", "float16")  # by torch's names


@dataclass(frozen=True)
class ExtractOptions:
    """How large and how good the adapter is to be; one of the first three.

    Example:
        >>> from spectral_fast.toolbox import ExtractOptions
        >>> ExtractOptions(error=0.1).error
        0.1
    """

    rank: int | None = option(None, "rank of every module", low=1)
    energy: float | None = option(None, "smallest ranks that keep this share of |ΔW|²", low=0, high=1)
    error: float | None = option(
        None, "smallest ranks with |ΔW - B A| / |ΔW| up to this, Frobenius norms", low=0, high=1
    )
    max_rank: int = option(256, "largest rank that --energy and --error may take", low=1)
    dtype: str = option("auto", "dtype of the factors; auto is that of the tuned weights", choices=("auto", *DTYPES))
    passes: int = option(2, "products with ΔWᵀΔW that find the directions, each a pass over both weights", low=1)
    oversampling: int = option(16, "directions that are found beyond the rank, and left out again", low=0)
    seed: int = option(0, "seed of the random directions to begin with")

    def __post_init__(self) -> None:
        check(self)
        goals = {name: getattr(self, name) for name in ("rank", "energy", "error") if getattr(self, name) is not None}
        if len(goals) != 1:
            raise ValueError(
                "give one of rank, energy and error; got "
                f"{', '.join(f'{name}={value}' for name, value in goals.items()) or 'none'}"
            )

    @property
    def most(self) -> int:
        """The largest rank that a module may get."""
        return self.max_rank if self.rank is None else self.rank

    def choose(self, s: Tensor, projection: Projection) -> tuple[int, float, bool]:
        """Rank, ‖ΔW − B A‖² and whether it is what was asked for, from the singular values of a projection."""
        import torch

        tails = projection.missed + s.square().flip(0).cumsum(0).flip(0)  # [k]: with k directions
        tails = torch.cat([tails, tails.new_tensor([projection.missed])])
        most = min(self.most, len(s))
        if self.rank is not None:
            return most, float(tails[most]), True
        share = 1 - self.energy if self.energy is not None else (self.error or 0.0) ** 2
        fits = (tails[1 : most + 1] <= share * projection.energy).nonzero()
        k = int(fits[0]) + 1 if len(fits) else most
        return k, float(tails[k]), len(fits) > 0

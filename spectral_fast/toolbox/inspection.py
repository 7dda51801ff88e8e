"""What the spectra of an adapter are like: norms, ranks, conditioning, and what looks wrong."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.kernels.lowrank_svd import singular_values
from spectral_fast.provenance import versions
from spectral_fast.toolbox import measures
from spectral_fast.toolbox.measures import Floats
from spectral_fast.toolbox.options import InspectOptions
from spectral_fast.toolbox.streaming import Batch, Factors, Progress, streamed

SHARES = (0.90, 0.95, 0.99)
TOP = (1, 4, 16)


@dataclass(frozen=True, eq=False)
class Inspected:
    """The spectrum of one module's ΔW = scaling · B A.

    Attributes:
        module: the module.
        s: (r,) singular values of ΔW, scaling included, descending.
        spike: above this many times the median a singular value is a spike.
    """

    module: LoraModule
    s: Floats
    spike: float

    def row(self) -> dict[str, Any]:
        """Numbers of the module, as JSON has them; None where the update is zero.

        `frobenius`, `spectral` and `nuclear` are norms of ΔW. `stable_rank` is ‖ΔW‖_F² / ‖ΔW‖₂², `effective_rank` exp
        of the entropy of s / Σ s, `numerical_rank` how many s are above the rounding of the largest in float32, and
        `condition` the largest over the smallest of those. `energy_top_k` is the share of Σ s² that the k largest have,
        `rank_90` the fewest directions with 90 % of it.
        """
        x, s = self.module, self.s
        squares = np.square(s)
        total, values = float(squares.sum()), measures.nonzero(s)
        some = bool(len(values))
        row: dict[str, Any] = {
            "module": x.name,
            "m": x.m,
            "n": x.n,
            "r": x.r,
            "dtype": str(x.dtype).removeprefix("torch."),
            "scaling": x.scaling,
            "frobenius": math.sqrt(total),
            "spectral": float(s[0]),
            "nuclear": float(s.sum()),
            "stable_rank": total / float(squares[0]) if some else None,
            "effective_rank": measures.effective_rank(s) if some else None,
            "numerical_rank": len(values),
            "condition": float(values[0] / values[-1]) if some else None,
        }
        shares = np.cumsum(squares) / total if some else None
        row |= {f"energy_top_{k}": None if shares is None else float(shares[min(k, x.r) - 1]) for k in TOP}
        row |= {f"rank_{share * 100:.0f}": measures.rank_within(s, 1 - share) if some else None for share in SHARES}
        row["spikes"] = int((s > measures.spike_limit(s, self.spike)).sum())
        return row

    def remarks(self) -> list[str]:
        """What a reader should know, in words."""
        values, limit = measures.nonzero(self.s), measures.spike_limit(self.s, self.spike)
        if not len(values):
            return ["zero update"]
        found = []
        if dead := self.module.r - len(values):
            found.append(f"{dead} of {self.module.r} directions are zero")
        if spikes := int((self.s > limit).sum()):
            times = self.s[0] / measures.median(values)
            found.append(f"{spikes} {'spike' if spikes == 1 else 'spikes'}, up to {times:.3g} x median")
        return found


def inspect_adapter(
    adapter: Adapter,
    options: InspectOptions | None = None,
    *,
    modules: Sequence[LoraModule] | None = None,
    progress: Progress = iter,
) -> dict[str, Inspected]:
    """The spectra of an adapter's modules, from Gram matrices of its factors; every factor is read once.

    Args:
        adapter: the adapter, opened.
        options: what is worth a remark.
        modules: what to look at; by default every module that can be edited.
        progress: wraps the list of modules.

    Returns:
        module name -> its spectrum, in the order of `modules`.

    Raises:
        ValueError: factors that are not finite, named.

    Example:
        >>> from spectral_fast import Adapter, embedded
        >>> from spectral_fast.toolbox import inspect_adapter
        >>> adapter = Adapter.open(embedded.adapter_dir())
        >>> found = inspect_adapter(adapter)["base_model.model.model.layers.0.mlp.down_proj"]
        >>> found.s.shape, round(float(found.s[0]), 2), found.row()["rank_90"]
        ((32,), 2.63, 6)
    """
    spike = (options or InspectOptions()).spike
    chosen = list(adapter.modules.values()) if modules is None else list(modules)

    def solve(batch: Batch, factors: Factors) -> list[Inspected]:
        bs, as_ = map(list, zip(*factors, strict=True))
        found = singular_values(bs, as_, [module.name for module in batch])
        return [
            Inspected(module, abs(module.scaling) * s.numpy(), spike) for module, s in zip(batch, found, strict=True)
        ]

    with streamed(adapter, chosen, solve, progress) as results:
        return {found.module.name: found for batch in results for found in batch}


def record(adapter: Adapter, found: Mapping[str, Inspected], meta: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known, as JSON: of every module its numbers, singular values and remarks, and the file's hash."""
    return {
        "meta": {
            "lora_path": str(adapter.path),
            "adapter_sha256": adapter.fingerprint(),
            **meta,
            "versions": versions(),
        },
        "modules": {
            name: {**x.row(), "singular_values": x.s.tolist(), "remarks": x.remarks()} for name, x in found.items()
        },
        "carried": adapter.carried,
    }


def as_csv(found: Iterable[Inspected]) -> bytes:
    """A row per module, with the names of `Inspected.row` as heads."""
    rows = [x.row() for x in found]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()

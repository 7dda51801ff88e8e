"""Spectra of a model's layers: tail exponent, bulk and spikes of each, several matrices at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spectral_fast.allocation.bulk import Bulk, fit_bulk
from spectral_fast.allocation.eigenvalues import eigenvalues, gram, slices
from spectral_fast.allocation.layers import Layer
from spectral_fast.allocation.options import SpectralOptions
from spectral_fast.allocation.tail import EPS, Floats, Tail, finger_tail, median_tail, searched_tail
from spectral_fast.pipeline import one_thread_each

_BESIDE = 200_000_000  # bytes beside the largest matrix's own: what small matrices may take together in any case


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """What the spectrum of one layer says.

    Attributes:
        layer: the layer.
        eigs: (values,) float64, ascending, of WᵀW without a factor 1/N; of all slices of a convolution together.
        tail: the power law; None where there are too few eigenvalues, or all are zero.
        bulk: the Marchenko-Pastur bulk; None where all are zero.
    """

    layer: Layer
    eigs: Floats
    tail: Tail | None
    bulk: Bulk | None

    @property
    def spikes(self) -> int:
        """Eigenvalues beyond the bulk's edge."""
        return 0 if self.bulk is None else int((self.eigs > self.bulk.edge).sum())

    def row(self) -> dict[str, Any]:
        """Its row of the table; the columns up to num_spikes are the reference code's."""
        alpha, largest, norm = self.tail.alpha if self.tail else np.nan, float(self.eigs[-1]), float(self.eigs.sum())
        low, high = self.layer.sides
        return {
            "layer_index": self.layer.index,
            "alpha_hill": alpha,
            "spectral_norm": largest,
            "D": self.tail.distance if self.tail else np.nan,
            "layer_name": self.layer.name,
            "eigs": self.eigs,
            "norm": norm,
            "alphahat": alpha * np.log10(largest + EPS),
            "num_spikes": self.spikes,
            "stable_rank": norm / largest if largest else 0.0,
            "xmin": float(self.eigs[self.tail.start]) if self.tail else np.nan,
            "bulk_edge": self.bulk.edge if self.bulk else 0.0,
            "sigma_mp": self.bulk.sigma if self.bulk else 0.0,
            "Q": self.bulk.q if self.bulk else high / low,
            "shape": "x".join(map(str, self.layer.shape)),
            "lora_parameters_per_rank": self.layer.cost,
        }


def as_table(found: Sequence[LayerSpectrum]) -> Any:
    """A pandas.DataFrame of their rows, in the model's order."""
    from pandas import DataFrame

    return DataFrame([spectrum.row() for spectrum in found])


def spectra(
    layers: Sequence[Layer],
    options: SpectralOptions | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> list[LayerSpectrum]:
    """The spectrum of each layer, in the model's order.

    Matrices are worked on side by side, each with one thread: with two cores that takes 0.6 of the time of one after
    the other with two threads. The largest begin first. As many are in work as fit into four times the largest in
    float32, so that memory is bounded by that and what is loaded besides.

    Args:
        layers: from `layers_of`.
        options: how spectra are read.
        device: where products and eigenvalues are computed; None for a GPU where there is one, else the CPU. MPS has no
            float64, so a CPU works in its place.
        progress: is told the number of layers that are done, each time.

    Raises:
        ValueError: NaN or infinity in a weight.
    """
    options = options or SpectralOptions()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    where = torch.device("cpu") if where.type == "mps" else where
    found: dict[int, LayerSpectrum] = {}
    budget = max((16 * _numel(layer) for layer in layers), default=0)
    with one_thread_each() as cores:
        workers = 2 if where.type == "cuda" else cores  # one reads while the other computes
        for spectrum in _bounded(lambda layer: _spectrum(layer, options, where), layers, workers, budget):
            found[spectrum.layer.index] = spectrum
            progress(1)
    return [found[layer.index] for layer in layers]


def _bounded(
    work: Callable[[Layer], LayerSpectrum], layers: Sequence[Layer], workers: int, budget: int
) -> Iterator[LayerSpectrum]:
    """Results as they come; no more in work than fits into the budget together, or one."""
    waiting = sorted(layers, key=_memory, reverse=True)
    running: dict[Future[LayerSpectrum], int] = {}
    pool = ThreadPoolExecutor(workers)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                room = max(budget, _BESIDE) - sum(running.values())
                fits = next((i for i, layer in enumerate(waiting) if _memory(layer) <= room), None)
                if fits is None and running:
                    break
                layer = waiting.pop(fits or 0)
                running[pool.submit(work, layer)] = _memory(layer)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _numel(layer: Layer) -> int:
    return int(np.prod(layer.shape))


def _memory(layer: Layer) -> int:
    """Bytes at the peak: weight and Gram matrix, or the Gram matrix and the solver's copy of it."""
    k, _ = layer.sides
    count = _numel(layer) // (layer.shape[0] * layer.shape[1])
    return max(layer.nbytes + 8 * count * k**2, 8 * (count + 1) * k**2)


def _spectrum(layer: Layer, options: SpectralOptions, device: torch.device) -> LayerSpectrum:
    with torch.inference_mode():
        grams = [gram(matrix, device) for matrix in slices(layer.read())]
        if not all(bool(torch.isfinite(g.diagonal()).all()) for g in grams):
            raise ValueError(f"{layer.name} has NaN or infinity among its weights: there is no spectrum to take")
        eigs = eigenvalues(grams).numpy()
    if len(layer.shape) > 2:
        eigs = eigs * options.conv_normalization
    if options.filter_near_zero_eigenvalues and (eigs > options.eigenvalue_threshold).any():
        eigs = eigs[eigs > options.eigenvalue_threshold]
    if not eigs[-1]:
        return LayerSpectrum(layer, eigs, None, None)
    tail = _tail(eigs, options) if len(eigs) >= options.minimum_eigenvalues else None
    m, n = layer.sides
    if len(layer.shape) > 2 and options.conv_aspect == "slices":
        sizes = (*layer.shape[:2], int(np.prod(layer.shape[2:])))
        m, n = min(sizes), max(sizes)
    bulk = fit_bulk(
        eigs,
        m,
        n,
        sigma_method=options.sigma_method,
        tw_method=options.tw_method,
        tracy_widom=options.apply_tracy_widom_correction,
        rescale=options.rescale,
    )
    return LayerSpectrum(layer, eigs, tail, bulk)


def _tail(eigs: Floats, options: SpectralOptions) -> Tail:
    if options.power_law_fitting_method == "median":
        return median_tail(eigs, options.xmin_position)
    if options.power_law_fitting_method == "fix-finger":
        return finger_tail(eigs, options.histogram_bins, lower=options.finger_lower)
    return searched_tail(eigs)

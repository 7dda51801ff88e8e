"""Calibration of a model in memory: ours, beside what is done today and beside the same pass without g."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers_calibration as today
from benchmarks import scaling, tasks
from benchmarks.cases import TINY_LLAMA, Calibration
from benchmarks.models import peft_model
from benchmarks.samples import examples
from benchmarks.tasks import OURS, WITHOUT
from benchmarks.workloads import Candidate, Workload
from spectral_fast.bench.gate import WrongResult
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.data import Example
from spectral_fast.calibration.packed.decoder import Decoder, ready_for
from spectral_fast.calibration.packed.packing import Pack, packs
from spectral_fast.calibration.spectral_form import SpectralLinear, lora_layers, per_sample, spectral_form

Found = dict[str, Tensor]  # module name -> g, (r,) or per sample (samples, r)
BATCH = 2  # the nominal batch, as the method has it by default


def check(name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], limit: float) -> None:
    """Refuse a g that is not as near to the reference as `limit`, relative to all modules together."""
    if set(found) != set(wanted):
        raise WrongResult(f"{name} has g of {len(found)} modules, and {len(wanted)} are wanted")
    got, true = (torch.cat([x[key].double().flatten() for key in wanted]) for x in (found, wanted))
    error = float((got - true).norm() / true.norm())
    if not error <= limit:
        raise WrongResult(
            f"{name}: g differs by {error:.2g} of its norm from float32's; at most {limit:.2g} is rounding"
        )


def ours(model: Any, samples: Sequence[Example], batch_size: int) -> Found:
    """Sensitivities per sample, as ``spectral_fast.calibrate`` finds it."""
    return {
        name: module.samples
        for name, module in calibrate(model, "default", samples, batch_size=batch_size).modules.items()
    }


def ours_padded(model: Any, samples: Sequence[Example], batch_size: int) -> Found:
    """The same in padded rows, as for a model whose attention cannot be packed."""
    with spectral_form(model, today.ADAPTER, list(lora_layers(model, today.ADAPTER))) as layers:
        laid_out = packs(samples, batch_size, layout="padded")
        order = torch.tensor([i for pack in laid_out for i in pack.samples]).argsort()
        decoder = Decoder(model)
        with ready_for(decoder, "padded"):
            found = [one_pass(decoder, layers, pack, pack.starts) for pack in laid_out]
        return {name: torch.cat([x[name] for x in found])[order] for name in layers}


def plain(model: Any, samples: Sequence[Example], batch_size: int) -> Found:
    """PEFT's pass; g by the closed form, which is outside what is timed."""
    today.by_peft(model, samples, batch_size)
    return {}


# Name -> (implementation, nominal batch).
RUNS: dict[str, tuple[Callable[[Any, Sequence[Example], int], Found], int]] = {
    OURS: (ours, BATCH),
    tasks.BATCH_8: (ours, 8),
    tasks.PADDED: (ours_padded, BATCH),
    tasks.HOOKS[0]: (today.by_hooks, 2),
    tasks.HOOKS[1]: (today.by_hooks, 8),
    tasks.PLAIN[0]: (plain, 2),
    tasks.PLAIN[1]: (plain, 8),
}


def calibrations(case: Calibration, names: Sequence[str]) -> Workload:
    """Sensitivities of all modules from samples and a model in memory.

    The reference takes every sample alone through the same weights in float32, which gives g for any nominal batch.
    """
    samples, model = examples(case.samples), peft_model(case)
    wide = copy.deepcopy(model).float()
    reference = today.per_sample(wide, samples)
    del wide
    small, few = peft_model(TINY_LLAMA), samples[:2]

    def checked(name: str, batch_size: int, found: Found) -> None:
        rows = {key: g * today.weights(samples, batch_size) for key, g in reference.items()}
        found = found or today.from_gradients(model)
        by_sample = all(g.ndim == 2 for g in found.values())
        check(name, found, rows if by_sample else {key: g.sum(0) for key, g in rows.items()}, case.rounding)

    candidates = (
        Candidate(name, partial(run, small, few, n), partial(run, model, samples, n), partial(checked, name, n))
        for name in names
        for run, n in [RUNS[name]]
    )
    return for_pass(case, samples, candidates)


class Frozen(nn.Module):
    """The layer without sensitivity: base(x) + (x V)(s U)ᵀ, with s folded into U once."""

    def __init__(self, layer: SpectralLinear) -> None:
        super().__init__()
        self.base_layer, self.v = layer.base_layer, layer.vh.mT
        self.us = (layer.scaling * layer.s * layer.u).to(layer.u.dtype).mT.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output. The lowest one's is where the graph begins, as it does with g."""
        y = self.base_layer(x)
        out = torch.addmm(y.flatten(0, -2), x.flatten(0, -2) @ self.v, self.us).view(y.shape)
        return out if out.requires_grad else out.requires_grad_()


class Passes:
    """A forward and backward pass over one packed row, with any sensitivity.

    Args:
        model: PEFT model, which stays in spectral form.
        pack: the row.
    """

    def __init__(self, model: nn.Module, pack: Pack) -> None:
        self.model, self.pack, self.decoder = model, pack, Decoder(model)
        self._open = ExitStack()
        self.layers = self._open.enter_context(
            spectral_form(model, today.ADAPTER, list(lora_layers(model, today.ADAPTER)))
        )
        self.frozen = {name: Frozen(layer) for name, layer in self.layers.items()}

    def with_g(self, starts: Tensor) -> Found:
        """Sensitivities of every part of the row, of which `starts` has the first tokens."""
        self._put(self.layers)
        with ready_for(self.decoder, "packed"):
            return one_pass(self.decoder, self.layers, self.pack, starts)

    def without_g(self) -> Found:
        """The same pass, in which nothing is asked for."""
        self._put(self.frozen)
        with ready_for(self.decoder, "packed"):
            _backward(self.decoder, self.pack)
        return {}

    def saved(self, run: Callable[[], object]) -> int:
        """Bytes that autograd keeps while it runs, weights apart."""
        weights = {x.untyped_storage().data_ptr() for x in self.model.state_dict().values()}
        for layer in self.layers.values():
            weights |= {x.untyped_storage().data_ptr() for x in (layer.u, layer.vh, layer.s)}
        for layer in self.frozen.values():
            weights |= {x.untyped_storage().data_ptr() for x in (layer.v, layer.us)}
        return saved_bytes(run, weights)

    def _put(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer)


def saved_bytes(run: Callable[[], object], weights: Collection[int]) -> int:
    """Bytes of the storages that autograd keeps while `run` runs, but for those at the addresses of `weights`."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # and so its address is not used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@torch.enable_grad()
def _backward(decoder: Decoder, pack: Pack) -> None:
    hidden = decoder.hidden(pack)
    hidden.backward(decoder.loss_gradient(hidden, pack)[1])


def one_pass(decoder: Decoder, layers: Mapping[str, SpectralLinear], pack: Pack, starts: Tensor) -> Found:
    """Sensitivities of every part of a pack, (parts, r) per module."""
    with per_sample(layers, starts) as leaves:
        _backward(decoder, pack)
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def cost_of_g(case: Calibration, names: Sequence[str]) -> Workload:
    """One packed pass: with g per sample, with g in one sum, and without g.

    What autograd keeps for the backward pass is counted, too.
    """
    samples, model = examples(case.samples), peft_model(case)
    reference = today.per_sample(copy.deepcopy(model).float(), samples)
    rows = {name: g * today.weights(samples, BATCH) for name, g in reference.items()}
    [pack] = packs(samples, BATCH, tokens=10**9)
    passes, small = Passes(model, pack), Passes(peft_model(TINY_LLAMA), packs(samples[:2], BATCH)[0])

    def run(name: str, on: Passes) -> Found:
        if name == WITHOUT:
            return on.without_g()
        return on.with_g(on.pack.starts if name == OURS else on.pack.starts[[0, -1]])

    def checked(name: str, found: Found) -> None:
        if name != WITHOUT:
            wanted = rows if name == OURS else {key: g.sum(0)[None] for key, g in rows.items()}
            check(name, found, wanted, case.rounding)

    candidates = (
        Candidate(
            name,
            warm_up=partial(run, name, small),
            run=partial(run, name, passes),
            check=partial(checked, name),
            saved=partial(passes.saved, partial(run, name, passes)),
        )
        for name in names
    )
    return for_pass(case, samples, candidates)


def for_pass(case: Calibration, samples: Sequence[Example], candidates: Iterator[Candidate]) -> Workload:
    """With what a pass cannot do without: each product once forward and once back, and every weight read twice."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    shape = scaling.Shape.of(case)
    flops = scaling.flops(shape, scaling.Work.of(samples, case.rank), recomputed=False)
    copied = [(torch.empty(2**27, dtype=dtype), torch.ones(2**27, dtype=dtype))]
    nbytes = 2 * shape.parameters * dtype.itemsize
    tokens = sum(len(x.ids) for x in samples)
    return Workload(candidates, copied, nbytes, flops, (dtype, torch.float32), tokens)

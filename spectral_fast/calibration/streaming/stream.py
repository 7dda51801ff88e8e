"""Layer-major calibration: all samples go through a layer before the next, and each layer's weights come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_fast.calibration.packed.attention import Unpackable
from spectral_fast.calibration.packed.decoder import Decoder
from spectral_fast.calibration.packed.packing import Pack
from spectral_fast.calibration.spectral_form import SpectralLinear, frozen, per_sample, spectra_of, swapped
from spectral_fast.calibration.streaming.bypass import Call, Trace, bypass
from spectral_fast.calibration.streaming.graphs import Graph, KeptGraphs, record
from spectral_fast.calibration.streaming.weights import EMBEDDINGS, HEAD, INSTEAD, OTHER, Part, Weights
from spectral_fast.calibration.streaming.work_folder import Stage
from spectral_fast.spectrum import Spectrum
from spectral_fast.tensorfile import Put, TensorInfo

EMBED, FORWARD, LOSS, BACKWARD = "embed", "forward", "loss", "backward"
Step = tuple[str, Part]  # what to do, with which part of the model


@contextmanager
def streamed(
    model: nn.Module, adapter_name: str, names: Sequence[str], *, weights: Weights, folder: Path, budget: int
) -> Iterator[Streamed]:
    """The engine for a model of `load_skeleton`; see `Streamed` for the arguments."""
    with frozen(model):
        yield Streamed(model, adapter_name, spectra_of(model, adapter_name, names), weights, folder, budget)


@dataclass(frozen=True)
class Streamed:
    """The engine that has one decoder layer at a time: packs of samples to g per sample.

    In the forward sweep every layer is run on all packs, and its output written to a file, the input of the next; in
    the backward sweep, from the last layer to the lowest one with a module to measure, every layer is run again on
    its input and differentiated. Layers whose graphs fit the budget are not run again.

    Attributes:
        model: PEFT model, its parameters frozen, whose base weights are in their places when `weights` puts them.
        adapter_name: the adapter to take.
        spectra: of each module to measure, by its name in `model.named_modules()`.
        weights: of the base model.
        folder: for the files of the run; what a killed one left there is not computed again.
        budget: memory for graphs that are kept, in bytes.
    """

    model: nn.Module
    adapter_name: str
    spectra: Mapping[str, Spectrum]
    weights: Weights
    folder: Path
    budget: int

    @property
    def s(self) -> dict[str, Tensor]:
        """Name -> singular values, (r,) float64."""
        return {name: spectrum.s.cpu() for name, spectrum in self.spectra.items()}

    @property
    def layers_at_once(self) -> int:
        """Graphs that are kept beside it are counted, see `budget`."""
        return 1

    @cached_property
    def decoder(self) -> Decoder:
        """The model in its two halves."""
        return Decoder(self.model)

    @cached_property
    def by_part(self) -> dict[Part, dict[str, Spectrum]]:
        """The spectra of each decoder layer and of the head.

        Raises:
            ValueError: a module is in neither.
        """
        places: dict[nn.Module, Part] = {m: i for i, x in enumerate(self.decoder.layers[1]) for m in x.modules()}
        between = set(self.decoder.trunk.modules()) - set(places)
        found: dict[Part, dict[str, Spectrum]] = {}
        for name, spectrum in self.spectra.items():
            module = self.model.get_submodule(name)
            if module in between:
                raise ValueError(f"{name} is in no decoder layer, so that its gradient cannot be streamed; {INSTEAD}")
            found.setdefault(places.get(module, HEAD), {})[name] = spectrum
        return found

    def __call__(
        self, packs: Sequence[Pack], progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
    ) -> dict[str, Tensor]:
        """Name -> g of each sample, (samples, r), in the order of the packs and of the samples in them.

        Raises:
            ValueError: when the loss or some g is NaN or infinite, or for a model that cannot be streamed.
            OSError: the disk has no room for the layer inputs.
        """
        if not packs:
            return {name: s.new_empty(0, len(s), dtype=torch.float32) for name, s in self.s.items()}
        scale = 2.0**12 if self.decoder.model.dtype == torch.float16 else 1.0
        while True:
            stage = Stage(self.folder / _digest(packs))
            sweeps = _Sweeps(self, stage, packs, scale)
            try:
                return sweeps.run(progress)
            except Unpackable:  # the samples come again in another layout
                stage.discard()
                raise
            except _OverflowError:
                if sweeps.scale <= 1.0:
                    raise
                scale = sweeps.scale / 16.0
                stage.remove("gradient-*")


class _Sweeps:
    """Both sweeps over a list of packs.

    File `inputs-L` has the input of layer L for every pack, and `gradient-L` the loss's gradient with respect to it
    and g of all modules from layer L on; the head counts as the layer after the last.

    float16 gradients underflow below 6e-8, so the loss is scaled by a power of two (exact). Layer inputs stay as long
    as that may overflow: the backward sweep can then begin again.
    """

    def __init__(self, engine: Streamed, stage: Stage, packs: Sequence[Pack], scale: float) -> None:
        self.engine, self.weights, self.decoder = engine, engine.weights, engine.decoder
        self.layers = engine.decoder.layers[1]
        self.lowest = min((part for part in engine.by_part if isinstance(part, int)), default=len(self.layers))
        self.stage = stage
        self.packs = [pack.to(engine.weights.device) for pack in packs]
        self.dtype: torch.dtype = engine.decoder.model.dtype
        self.scale = scale
        self.kept = KeptGraphs(engine.budget)
        self.calls: list[list[Call]] = []  # of each pack, for each layer
        self.g: dict[str, Tensor] = {}

    def run(self, progress: Callable[[Sequence[Step]], Iterable[Step]]) -> dict[str, Tensor]:
        """Do what is left to do."""
        steps = self._steps()
        # The last layer stays in its place over the turning point.
        stays = [k >= 2 and steps[k - 2] == (FORWARD, part) for k, (_, part) in enumerate(steps)]
        reads = [part for (_, part), there in zip(steps, stays, strict=True) if not there]
        do = {EMBED: self._embed, FORWARD: self._forward, LOSS: self._loss, BACKWARD: self._backward}
        resumed = bool(steps) and steps[0][0] != EMBED
        first = [OTHER, EMBEDDINGS] if resumed else [OTHER]
        try:
            with self.weights.prefetched([*first, *reads] if steps else []) as parts:
                for k, (kind, part) in enumerate(progress(steps)):
                    if k == 0:
                        assert [next(parts) for _ in first] == first
                    if k == 0 and resumed:  # how layers are called may depend on the embeddings
                        self.calls = [trace.calls for trace in self._traces()]
                        self.weights.drop(EMBEDDINGS)
                    if not stays[k]:
                        assert next(parts) == part
                    do[kind](part)
                    if (kind, part) != (FORWARD, len(self.layers) - 1):
                        self.weights.drop(part)
        finally:
            for part in (OTHER, EMBEDDINGS, *range(len(self.layers))):
                self.weights.drop(part)
        self.stage.remove("inputs-*")
        return {name: self.g[name] for name in self.engine.spectra}

    def _steps(self) -> list[Step]:
        depth = len(self.layers)
        done = [k for k in range(self.lowest, depth + 1) if self.stage.has(f"gradient-{k}")]
        if done:
            file = self.stage.open(f"gradient-{done[0]}")
            self.scale = file.read("scale").item()
            self.g = {key[2:]: file.read(key) for key in file.tensors if key.startswith("g.")}
            return [(BACKWARD, k) for k in range(done[0] - 1, self.lowest - 1, -1)]
        begun = [k for k in range(depth + 1) if self.stage.has(f"inputs-{k}")]
        steps: list[Step] = [(FORWARD, k) for k in range(begun[-1], depth)] if begun else [(EMBED, EMBEDDINGS)]
        if not begun:
            steps += [(FORWARD, k) for k in range(depth)]
        return [*steps, (LOSS, HEAD), *((BACKWARD, k) for k in range(depth - 1, self.lowest - 1, -1))]

    def _traces(self) -> list[Trace]:
        with torch.no_grad():
            return [bypass(self.decoder, pack) for pack in self.packs]

    def _embed(self, _: Part) -> None:
        traces = self._traces()
        self.calls = [trace.calls for trace in traces]
        hidden = {str(i): trace.first for i, trace in enumerate(traces)}
        # Of every layer from the lowest on, of the head, and while a file takes another's place.
        self.stage.reserve((len(self.layers) + 3 - self.lowest) * sum(x.nbytes for x in hidden.values()))
        infos = {key: TensorInfo(x.dtype, tuple(x.shape)) for key, x in hidden.items()}
        with self.stage.writing("inputs-0", infos) as put:
            for key, x in hidden.items():
                put(key, x)

    def _forward(self, k: Part) -> None:
        assert isinstance(k, int)
        inputs = self.stage.open(f"inputs-{k}")
        keep = k >= self.lowest and self.kept.worth(len(self.layers) - 1 - k)
        with self._spectral(k) as modules, self.stage.writing(f"inputs-{k + 1}", inputs.tensors) as put:
            for i in range(len(self.packs)):
                x = inputs.read(str(i)).to(self.weights.device)
                if keep:
                    graph = self._graph(k, i, x, modules)
                    self.kept.put(k, i, graph)
                    y = graph.y
                else:
                    with torch.no_grad():
                        y = self.calls[i][k](self.layers[k], x)
                put(str(i), y)
        if k < self.lowest:
            self.stage.remove(f"inputs-{k}")

    def _loss(self, head: Part) -> None:
        depth = len(self.layers)
        inputs = self.stage.open(f"inputs-{depth}")
        below = self.lowest < depth
        with (
            self._spectral(head) as modules,
            self._gradients(depth, inputs.tensors if below else {}, modules) as (put, add),
        ):
            for i, pack in enumerate(self.packs):
                h = inputs.read(str(i)).to(self.weights.device).requires_grad_(below)
                with per_sample(modules, pack.starts) as leaves:
                    with torch.set_grad_enabled(below):
                        last = bypass(self.decoder, pack, h).last
                    _, gradient = self.decoder.loss_gradient(last, pack, self.scale, modules.values())
                if below:
                    last.backward(gradient)  # type: ignore[no-untyped-call]
                    put(str(i), _gradient_of(h))
                add(leaves)
        self._done_with(depth)

    def _backward(self, k: Part) -> None:
        assert isinstance(k, int)
        inputs, above = self.stage.open(f"inputs-{k}"), self.stage.open(f"gradient-{k + 1}")
        below = self.lowest < k
        with (
            self._spectral(k) as modules,
            self._gradients(k, inputs.tensors if below else {}, modules) as (put, add),
        ):
            for i in range(len(self.packs)):
                graph = self.kept.take(k, i)
                if graph is None:
                    graph = self._graph(k, i, inputs.read(str(i)).to(self.weights.device), modules)
                if graph.y.requires_grad:  # not where a pack has no token for the only experts that are measured
                    torch.autograd.backward(graph.y, above.read(str(i)).to(graph.y))
                if below:
                    put(str(i), _gradient_of(graph.x))
                add(graph.leaves)
        self.stage.remove(f"gradient-{k + 1}")
        self._done_with(k)

    def _done_with(self, k: int) -> None:
        if self.scale == 1.0:
            self.stage.remove(f"inputs-{k}")

    def _graph(self, k: int, i: int, x: Tensor, modules: Mapping[str, SpectralLinear]) -> Graph:
        def compute() -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
            with per_sample(modules, self.packs[i].starts) as leaves:
                return x, self.calls[i][k](self.layers[k], x), leaves

        x.requires_grad_(k > self.lowest)
        return record(self.layers[k], compute)

    def _spectral(self, part: Part) -> AbstractContextManager[dict[str, SpectralLinear]]:
        return swapped(self.engine.model, self.engine.adapter_name, self.engine.by_part.get(part, {}))

    @contextmanager
    def _gradients(
        self, k: int, hidden: Mapping[str, TensorInfo], modules: Mapping[str, SpectralLinear]
    ) -> Iterator[tuple[Put, Callable[[Mapping[str, Tensor]], None]]]:
        """File `gradient-k`: a function to write a pack's gradient, and one to take a pack's g from its leaves."""
        rows: dict[str, list[Tensor]] = {name: [] for name in modules}

        def add(leaves: Mapping[str, Tensor]) -> None:
            for name, leaf in leaves.items():
                g = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / self.scale
                if not g.isfinite().all():
                    raise _OverflowError(f"the sensitivity of {name} is NaN or infinite; try --dtype bf16 or fp32")
                rows[name].append(g.float().cpu())

        samples = sum(len(pack.samples) for pack in self.packs)
        spectra = [self.engine.spectra[name] for name in modules]
        new = {name: TensorInfo(torch.float32, (samples, len(x.s))) for name, x in zip(modules, spectra, strict=True)}
        old = {name: TensorInfo(g.dtype, tuple(g.shape)) for name, g in self.g.items()}
        scale = torch.tensor(self.scale)
        hidden = {**hidden, "scale": TensorInfo(scale.dtype, ())}
        files = {**hidden, **{f"g.{name}": info for name, info in {**old, **new}.items()}}
        with self.stage.writing(f"gradient-{k}", files) as put:
            put("scale", scale)
            yield put, add
            self.g |= {name: torch.cat(parts) for name, parts in rows.items()}
            for name, g in self.g.items():
                put(f"g.{name}", g)


class _OverflowError(ValueError):
    """Some g is not finite; it may be at a smaller scale."""


def _gradient_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _digest(packs: Sequence[Pack]) -> str:
    """A name for the samples and their layout."""
    digest = sha256()
    for pack in packs:
        tensors = (pack.input_ids, pack.position_ids, pack.starts, pack.positions, pack.targets, pack.weights)
        for tensor in (*tensors, torch.tensor(pack.samples)):
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

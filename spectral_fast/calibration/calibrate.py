"""Sensitivity of a loss to every singular value of an adapter, measured on a model in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.data import IGNORED, Example, as_examples
from spectral_fast.calibration.model import attached
from spectral_fast.calibration.packed.attention import Unpackable
from spectral_fast.calibration.packed.decoder import Decoder, ready_for
from spectral_fast.calibration.packed.packing import Pack, label_weights, packs
from spectral_fast.calibration.ranks import Ranks
from spectral_fast.calibration.rounds import in_rounds
from spectral_fast.calibration.spectral_form import SpectralLinear, adapter_layers, bare, per_sample, spectral_form
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity

Progress = Callable[[Sequence[Any]], Iterable[Any]]


class Engine(Protocol):
    """What runs a model on packs of samples."""

    @property
    def s(self) -> Mapping[str, Tensor]:
        """Name -> singular values, (r,) float64, on the CPU."""

    @property
    def layers_at_once(self) -> int | None:
        """How many layers have a graph at the same time; None for all."""

    def __call__(self, packs: Sequence[Pack], progress: Progress = iter, /) -> dict[str, Tensor]:
        """Name -> g of each sample, (samples, r), in the order of the packs and of the samples in them."""


Engines = Callable[[nn.Module, str, Sequence[str]], AbstractContextManager[Engine]]  # model, adapter name, modules


@contextmanager
def in_memory(model: nn.Module, adapter_name: str, names: Sequence[str]) -> Iterator[Engine]:
    """The engine for a model that has all its weights; within the context the model is in spectral form."""
    with spectral_form(model, adapter_name, names) as layers:
        yield InMemory(Decoder(model), layers)


def calibrate(
    model: nn.Module,
    adapter: str | Adapter,
    data: Iterable[Example | Mapping[str, Any]],
    *,
    modules: Iterable[str] | None = None,
    batch_size: int = 2,
    pack_tokens: int | None = None,
    until_stable: float = 0.0,
    progress: Progress = iter,
    ranks: Ranks | None = None,
    engines: Engines = in_memory,
) -> Sensitivity:
    """Measure g_k = ∂L/∂σ_k for the singular directions of an adapter's modules.

    L is the sum over nominal batches (`batch_size` examples in order) of each batch's mean token loss, so
    g_k = scaling · Σ_n ⟨∂L/∂y_n, u_k⟩⟨x_n, v_k⟩ over all tokens. How samples share the passes does not matter: they
    are packed in rows without padding where the model's attention can keep them apart. The model is used in
    evaluation mode, in its own dtype and on its own device, and is left as it was found.

    Args:
        model: PEFT model with the adapter loaded and active; or a model without, for an adapter from its files.
        adapter: name under which PEFT knows the adapter; or the adapter, which the model then carries during this call.
        data: samples as a training loop has them, such as rows of a data set; see `as_examples`.
        modules: names of the LoRA layers to measure; by default all linear ones.
        batch_size: examples per nominal batch (`--calib_batch_size`).
        pack_tokens: tokens that go through the model at once, at most; longer samples go alone. By default as many as
            keep some 4 GiB for the backward pass, but at least 512.
        until_stable: take no more examples once doubling them has left this share of the core and noise directions as
            they were, see `spectral_fast.calibration.rounds`; g is then that of a plain run on the examples used.
        progress: wraps the list of packs, e.g. with a progress bar; once per round with `until_stable`.
        ranks: the processes that share the samples, each with this model and all data: those of a process group of
            torch.distributed by `Ranks.of_process_group(group)`. All get the same result. By default this one alone.
        engines: makes what runs the model; by default in memory, see also `spectral_fast.calibration.streaming.stream`.

    Returns:
        Sensitivity with s and g (float64) of shape (r,) and g per sample, (samples, r) float32, per module. The record
        has what `in_rounds` tells: `samples_used` and, with `until_stable`, its checks.

    Raises:
        ValueError: for data that `as_examples` refuses, without a labelled token in some batch, for an example longer
            than the model's positions, for names that cannot be probed, and when the loss or some g is NaN or
            infinite (named by module).

    Source: Tian et al., "Spectral Surgery", arXiv:2603.03995, section on gradient-guided sensitivity.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from spectral_fast import Adapter, calibrate, embedded
        >>> base = AutoModelForCausalLM.from_pretrained(embedded.base_model_dir(), dtype=torch.float32)
        >>> rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 8], "labels": [9, 8]}]
        >>> measured = calibrate(base, Adapter.open(embedded.adapter_dir()), rows)
        >>> len(measured.modules), measured.record["samples_used"]
        (20, 2)
    """
    examples = as_examples(data)
    model = bare(model)
    check_examples(examples, model)
    label_weights(examples, batch_size)  # what is wrong with a batch is said before anything is computed
    if not 0 <= until_stable <= 1:
        raise ValueError(f"until_stable is a share of directions, from 0 (off) to 1; got {until_stable}")
    with attached(model, adapter) as (model, adapter_name):
        decoder = Decoder(model)
        names = adapter_layers(model, adapter_name, modules)
        ranks = ranks or Ranks()
        alone = any(routed(name) for name in names) or length_matters(decoder.model.config, examples)
        layout = "single" if alone else "packed"
        with engines(model, adapter_name, names) as engine:
            tokens = pack_tokens or decoder.pack_tokens(engine.layers_at_once)

            def laid_out(part: range, layout: str) -> dict[str, Tensor]:
                lengths = [len(examples[i].ids) for i in part]
                mine = [part[i] for i in ranks.share(lengths)]
                chosen = packs(examples[: part.stop], batch_size, samples=mine, tokens=tokens, layout=layout)
                with ready_for(decoder, layout):
                    found = engine(chosen, lambda packs: ranks.watched(progress(packs)))
                return ranks.sum(in_order(found, chosen, part))

            def measure(part: range) -> dict[str, Tensor]:
                nonlocal layout
                try:
                    return laid_out(part, layout)
                except Unpackable:
                    layout = "padded"
                    return laid_out(part, layout)

            found, record = in_rounds(measure, len(examples), batch_size, until_stable)
            if isinstance(adapter, Adapter):
                record["adapter_sha256"] = adapter.fingerprint()
            return Sensitivity(
                {name: ModuleSensitivity.of_samples(s, found[name]) for name, s in engine.s.items()}, record
            )


class InMemory:
    """The engine that runs whole models: packs of samples to g per sample.

    Args:
        decoder: the model, which holds all its weights.
        layers: its layers in spectral form.
    """

    layers_at_once = None

    def __init__(self, decoder: Decoder, layers: Mapping[str, SpectralLinear]) -> None:
        self.decoder, self.layers = decoder, layers
        trunk = {module for module in decoder.trunk.modules() if isinstance(module, SpectralLinear)}
        self._of_head = [layer for layer in layers.values() if layer not in trunk]
        self._of_trunk = len(self._of_head) < len(layers)
        self._dtype = next(decoder.model.parameters()).dtype
        self._scale = 2.0**12 if self._dtype == torch.float16 else 1.0

    @property
    def s(self) -> dict[str, Tensor]:
        """Name -> singular values, (r,) float64, on the CPU."""
        return {name: layer.singular_values for name, layer in self.layers.items()}

    def __call__(self, packs: Sequence[Pack], progress: Progress = iter) -> dict[str, Tensor]:
        """Name -> g of each sample, (samples, r), in the order of the packs and of the samples in them.

        Raises:
            ValueError: when the loss or some g is NaN or infinite, naming the module.
        """
        device = next(self.decoder.model.parameters()).device
        parts = [self._gradients(pack.to(device)) for pack in progress(packs)]
        return {
            name: torch.cat([layer.s.new_empty(0, len(layer.s), device="cpu"), *(part[name] for part in parts)])
            for name, layer in self.layers.items()
        }

    def _gradients(self, pack: Pack) -> dict[str, Tensor]:
        """Sensitivities of one pack.

        float16 gradients underflow below 6e-8, so the loss is scaled by a power of two (exact), and the pack repeated
        at a smaller scale when that overflows.
        """
        while True:
            with per_sample(self.layers, pack.starts) as leaves:
                self._pass(pack)
                found = {name: _cpu_grad(leaf) / self._scale for name, leaf in leaves.items()}
            bad = [name for name, g in found.items() if not g.isfinite().all()]
            if not bad:
                return found
            if self._scale <= 1.0:
                raise ValueError(
                    f"the sensitivity of {bad[0]} is NaN or infinite ({len(bad)} of {len(found)} modules);"
                    " try --dtype fp32"
                )
            self._scale /= 16.0

    def _pass(self, pack: Pack) -> None:
        """Forward and backward."""
        with torch.set_grad_enabled(self._of_trunk):
            hidden = self.decoder.hidden(pack)
        _, gradient = self.decoder.loss_gradient(hidden, pack, self._scale, self._of_head)
        if hidden.requires_grad:
            hidden.backward(gradient)  # type: ignore[no-untyped-call]


def in_order(found: Mapping[str, Tensor], packs: Sequence[Pack], part: range) -> dict[str, Tensor]:
    """Rows in the order of a range of samples instead of that of the packs; zeros where there is none."""
    order = torch.tensor([sample - part.start for pack in packs for sample in pack.samples], dtype=torch.long)
    return {name: g.new_zeros(len(part), g.shape[1]).index_copy(0, order, g) for name, g in found.items()}


def routed(name: str) -> bool:
    """Whether a module is one expert of several in its layer, which sees samples' tokens in an order of its own."""
    return len(re.findall(r"\.\d+(?=\.|$)", name)) > 1


def length_matters(config: Any, examples: Sequence[Example]) -> bool:
    """Whether the model's rotary embeddings change with the longest sample of a pass, and some sample is that long."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            own = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
            return any(len(example.ids) > own for example in examples)
    return False


def check_examples(examples: Sequence[Example], model: Any) -> None:
    """Raises ValueError for no example at all, or one that the model cannot take."""
    if not examples:
        raise ValueError("calibration needs at least one sample, got none")
    config = getattr(model, "config", None)
    limit, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    for index, example in enumerate(examples):
        if not example.ids:
            raise ValueError(f"calibration sample {index} has no tokens; leave it out")
        if limit is not None and len(example.ids) > limit:
            raise ValueError(
                f"calibration sample {index} has {len(example.ids)} tokens, but the model has only {limit} positions; "
                "leave it out of the file"
            )
        tokens = {*example.ids, *(label for label in example.labels if label != IGNORED)}
        wrong = [token for token in tokens if token < 0 or (vocabulary is not None and token >= vocabulary)]
        if wrong:
            raise ValueError(
                f"calibration sample {index} has token {wrong[0]}, but the model knows {vocabulary}; is the tokenizer "
                "that of another model?"
            )


def _cpu_grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, device="cpu") if leaf.grad is None else leaf.grad.cpu()

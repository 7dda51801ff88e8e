"""Swap a PEFT model's LoRA layers for their spectral form, and back, whatever happens in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_fast.calibration.quantised import compute_dtype, is_lora_linear, keep_differentiable
from spectral_fast.kernels.spectral_linear import spectral_linear
from spectral_fast.spectrum import Spectrum, lowrank_svd


class SpectralLinear(nn.Module):
    """A LoRA linear layer as base(x) + scaling · ((x V) ⊙ s) Uᵀ, of which nothing but s is differentiated.

    Singular values are given once per sample, by `per_sample`, so that each sample has a gradient of its own.

    Attributes:
        singular_values: (r,) float64, on the CPU.
        s: the same as the layer computes with them: float32, or float64 in a float64 model.
        starts: first token of each sample among those that the layer is called with, and their number.
        of_samples: the leaf that is differentiated, (samples, r): s in every row.

    Args:
        layer: PEFT's LoRA layer; its base layer is called, its own factors are not.
        adapter_name: which of the layer's adapters this is the spectral form of.
        spectrum: the compact SVD of that adapter's B A.
    """

    def __init__(self, layer: Any, adapter_name: str, spectrum: Spectrum) -> None:
        super().__init__()
        factor: Tensor = layer.lora_B[adapter_name].weight
        base_dtype = compute_dtype(layer.base_layer) or factor.dtype
        wide = torch.float64 if base_dtype == torch.float64 else torch.float32
        self.base_layer = layer.base_layer
        self.scaling = float(layer.scaling[adapter_name])
        self.singular_values = spectrum.s.cpu()
        self.s = spectrum.s.to(factor.device, wide)
        self.starts: Tensor | None = None
        self.of_samples = self.s[None]
        u, vh = spectrum.u.to(factor.device, wide), spectrum.vh.to(factor.device, wide)
        self.base_gain = self.base_bias = None
        if adapter_name in layer.lora_variant:
            gain = _dora_gain(layer, adapter_name).to(wide)
            u = gain[:, None] * u
            self.base_gain = gain.to(base_dtype)
            self.base_bias = layer.base_layer.bias
        bias = layer.lora_B[adapter_name].bias
        self.branch_bias = None if bias is None else (self.scaling * bias.detach()).to(base_dtype)
        self.u, self.vh = u.to(base_dtype), vh.to(base_dtype)

    @property
    def weight(self) -> Tensor:
        """The base layer's, as PEFT's layers have it: some models look at the weights of their linear layers."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's, like `weight`."""
        bias: Tensor | None = self.base_layer.bias
        return bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, (..., m), for input (..., n)."""
        y = self.base_layer(x, *args, **kwargs)
        if self.base_gain is not None:
            y = y * self.base_gain if self.base_bias is None else (y - self.base_bias) * self.base_gain + self.base_bias
        if self.branch_bias is not None:
            y = y + self.branch_bias
        starts = self.starts
        if len(self.of_samples) == 1:  # an expert sees some of its tokens only
            starts = torch.tensor([0, x.shape[:-1].numel()])
        return spectral_linear(x.to(self.u.dtype), y, self.u, self.of_samples, self.vh, self.scaling, starts)


@contextlib.contextmanager
def per_sample(layers: Mapping[str, SpectralLinear], starts: Tensor) -> Iterator[dict[str, Tensor]]:
    """Within the context a backward pass leaves g per sample.

    Args:
        layers: name -> layer.
        starts: first token of each sample of the pack, and the number of tokens: (samples + 1,) int64, on the CPU.

    Yields:
        name -> leaf (samples, r), whose `.grad` is g per sample: None where the layer was not reached.
    """
    for layer in layers.values():
        layer.starts = starts
        layer.of_samples = layer.s.repeat(len(starts) - 1, 1).requires_grad_()
    try:
        yield {name: layer.of_samples for name, layer in layers.items()}
    finally:
        for layer in layers.values():
            layer.starts, layer.of_samples = None, layer.s[None]


def _dora_gain(layer: Any, adapter_name: str) -> Tensor:
    """DoRA's magnitude / ‖W₀ + s B A‖ per output row, a constant of the backward pass as in PEFT. (m,)."""
    from peft.utils.integrations import dequantize_module_weight

    dora = layer.lora_magnitude_vector[adapter_name]
    with torch.no_grad():
        delta = layer.lora_B[adapter_name].weight @ layer.lora_A[adapter_name].weight
        weight = dequantize_module_weight(layer.base_layer).to(delta.dtype)
        gain: Tensor = dora.weight / dora.get_weight_norm(weight, delta, layer.scaling[adapter_name])
    return gain


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """All linear LoRA layers of a PEFT model that carry the adapter, by their names in `model.named_modules()`."""
    layers: Iterable[tuple[str, Any]] = model.named_modules()
    return {name: layer for name, layer in layers if is_lora_linear(layer) and adapter_name in layer.lora_A}


def adapter_layers(model: nn.Module, adapter_name: str, modules: Iterable[str] | None = None) -> list[str]:
    """Names of the linear LoRA layers of an adapter, in `model.named_modules()`.

    Args:
        model: a PEFT model.
        adapter_name: name under which PEFT knows the adapter.
        modules: those that are wanted; by default all.

    Raises:
        ValueError: for an adapter that no linear LoRA layer carries, naming those that there are; for an empty
            `modules`, or a name in it that is not a linear LoRA layer of the adapter.
    """
    layers = lora_layers(model, adapter_name)
    if not layers:
        others = sorted({name for m in model.modules() if is_lora_linear(m) for name in cast("Any", m).lora_A})
        instead = f"it has {', '.join(map(repr, others))}" if others else "pass the PEFT model itself"
        raise ValueError(f"the model has no linear LoRA layer of adapter {adapter_name!r}; {instead}")
    names = list(layers if modules is None else modules)
    if not names:
        raise ValueError("modules must name at least one LoRA layer, got none; leave it out to take all")
    for name in names:
        if name not in layers:
            raise ValueError(
                f"{name} is not a linear LoRA layer of adapter {adapter_name!r} in this model; {next(iter(layers))} is"
            )
    return names


def bare(model: nn.Module) -> nn.Module:
    """The model itself, out of what torch.compile, DistributedDataParallel or DataParallel made of it."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif (compiled := model._modules.get("_orig_mod")) is not None:
            model = compiled
        else:
            return model


@contextlib.contextmanager
def spectral_form(model: nn.Module, adapter_name: str, names: Iterable[str]) -> Iterator[dict[str, SpectralLinear]]:
    """Within the context the named LoRA layers compute in spectral form, and no parameter is trainable.

    The model is in evaluation mode inside. On exit, also by an exception, every layer, `requires_grad` flag and
    `training` flag is what it was before; gradients that parameters already carried are not touched.

    Args:
        model: a PEFT model with the adapter loaded, active and not merged.
        adapter_name: the adapter to take; the only active one.
        names: names of LoRA layers in `model.named_modules()`.

    Yields:
        name -> SpectralLinear, in the order of `names`.

    Raises:
        ValueError: for a name that is not a linear LoRA layer of this adapter, a merged or inactive adapter, or a
            LoRA variant whose forward pass is not that of LoRA or DoRA.
    """
    spectra = spectra_of(model, adapter_name, names)
    with frozen(model), swapped(model, adapter_name, spectra) as layers:
        yield layers


def spectra_of(model: nn.Module, adapter_name: str, names: Iterable[str]) -> dict[str, Spectrum]:
    """The spectra of LoRA layers by their names, all computed at once.

    Raises:
        ValueError: as `spectral_form`.
    """
    names = adapter_layers(model, adapter_name, names)
    layers = lora_layers(model, adapter_name)
    for name in names:
        _check_layer(name, layers[name], adapter_name)
    pairs = [(layers[name].lora_B[adapter_name].weight, layers[name].lora_A[adapter_name].weight) for name in names]
    spectra = lowrank_svd([b.detach() for b, _ in pairs], [a.detach() for _, a in pairs], names)
    return dict(zip(names, spectra, strict=True))


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode and no parameter is trainable.

    Raises:
        ValueError: as `keep_differentiable`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval().requires_grad_(False)
        keep_differentiable(model)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        model.eval()
        for module in training:
            module.training = True


@contextlib.contextmanager
def swapped(
    model: nn.Module, adapter_name: str, spectra: Mapping[str, Spectrum]
) -> Iterator[dict[str, SpectralLinear]]:
    """Within the context the LoRA layers of these names compute in spectral form.

    Args:
        model: where their base weights are.
        adapter_name: the adapter to take.
        spectra: by the layers' names in `model.named_modules()`, see `spectra_of`.
    """
    layers = {name: model.get_submodule(name) for name in spectra}
    made = {name: SpectralLinear(layers[name], adapter_name, spectrum) for name, spectrum in spectra.items()}
    try:
        for name, module in made.items():
            _set_submodule(model, name, module)
        yield made
    finally:
        for name, layer in layers.items():
            _set_submodule(model, name, layer)


def _check_layer(name: str, layer: Any, adapter_name: str) -> None:
    if layer.merged or layer.disable_adapters:
        state = "merged into the base weights" if layer.merged else "disabled"
        raise ValueError(f"{name}: its adapters are {state}; call model.unmerge_adapter() or enable_adapter_layers()")
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if active != [adapter_name]:
        raise ValueError(
            f"{name}: active adapters are {active}, wanted only {adapter_name!r}; call model.set_adapter()"
        )
    variant = type(layer.lora_variant.get(adapter_name)).__name__
    if variant not in {"NoneType", "DoraLinearVariant"}:
        raise ValueError(f"{name}: the LoRA variant {variant} has no spectral form; only LoRA and DoRA can be probed")


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

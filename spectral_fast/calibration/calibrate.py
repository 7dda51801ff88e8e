"""Sensitivity of a loss to every singular value of an adapter, measured on a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from spectral_fast.calibration.data import Batch, Example, nominal_batches
from spectral_fast.calibration.loss import mean_token_loss
from spectral_fast.calibration.spectral_form import SpectralLinear, lora_layers, spectral_form
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity

Progress = Callable[[Sequence[Batch]], Iterable[Batch]]


def calibrate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    adapter_name: str = "default",
    modules: Iterable[str] | None = None,
    batch_size: int = 2,
    progress: Progress = iter,
) -> Sensitivity:
    """Measure g_k = ∂L/∂σ_k for the singular directions of an adapter's modules.

    L is the sum over nominal batches (`batch_size` examples in order) of each batch's mean token loss, so
    g_k = scaling · Σ_n ⟨∂L/∂y_n, u_k⟩⟨x_n, v_k⟩ over all tokens. The model is used in evaluation mode, in its own
    dtype and on its own device, and is left as it was found.

    Args:
        model: PEFT model with the adapter loaded and active.
        examples: token ids with their labels; see `spectral_fast.calibration.data`.
        adapter_name: name under which PEFT knows the adapter.
        modules: names of the LoRA layers to measure; by default all linear ones.
        batch_size: examples per nominal batch (`--calib_batch_size`).
        progress: wraps the list of batches, e.g. with a progress bar.

    Returns:
        Sensitivity with s (float64) and g (float64) of shape (r,) per module.

    Raises:
        ValueError: without a labelled token in some batch, for an example longer than the model's positions, for
            names that cannot be probed, and when the loss or some g is NaN or infinite (named by module).

    Source: Tian et al., "Spectral Surgery", arXiv:2603.03995, section on gradient-guided sensitivity.
    """
    _check_examples(examples, model)
    names = list(lora_layers(model, adapter_name) if modules is None else modules)
    batches = list(nominal_batches(examples, batch_size))
    for index, batch in enumerate(batches):
        if not (batch.labels[:, 1:] >= 0).any():
            first = index * batch_size
            raise ValueError(f"calibration samples {first} to {first + len(batch.labels) - 1} have no label to predict")
    device = next(model.parameters()).device
    with spectral_form(model, adapter_name, names) as layers:
        scale = 2.0**12 if next(model.parameters()).dtype == torch.float16 else 1.0
        for batch in progress(batches):
            scale = _accumulate(model, layers, batch.to(device), scale)
        return Sensitivity(
            {
                name: ModuleSensitivity(layer.s.detach().double().cpu(), _gradient(layer).cpu())
                for name, layer in layers.items()
            }
        )


def _accumulate(model: nn.Module, layers: dict[str, SpectralLinear], batch: Batch, scale: float) -> float:
    """Add one batch's gradient of every s; returns the loss scale to go on with.

    float16 gradients underflow below 6e-8, so the loss is scaled by a power of two (exact) and the batch repeated
    at a smaller scale when that overflows.
    """
    parameters = [layer.s for layer in layers.values()]
    with torch.enable_grad():
        while True:
            loss = mean_token_loss(model, batch)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the calibration loss is {loss.item()}: the base model or the adapter overflows in "
                    f"{next(model.parameters()).dtype}; try --dtype bf16 or fp32"
                )
            grads = torch.autograd.grad(loss * scale, parameters, materialize_grads=True)
            bad = [name for name, grad in zip(layers, grads, strict=True) if not torch.isfinite(grad).all()]
            if not bad:
                break
            if scale <= 1.0:
                raise ValueError(
                    f"the sensitivity of {bad[0]} is NaN or infinite ({len(bad)} of {len(layers)} modules);"
                    " try --dtype fp32"
                )
            scale /= 16.0
    for s, grad in zip(parameters, grads, strict=True):
        s.grad = grad / scale if s.grad is None else s.grad + grad / scale
    return scale


def _gradient(layer: SpectralLinear) -> torch.Tensor:
    assert layer.s.grad is not None
    return layer.s.grad.double()


def _check_examples(examples: Sequence[Example], model: Any) -> None:
    if not examples:
        raise ValueError("calibration needs at least one sample, got none")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for index, example in enumerate(examples):
        if limit is not None and len(example.ids) > limit:
            raise ValueError(
                f"calibration sample {index} has {len(example.ids)} tokens, but the model has only {limit} positions; "
                "leave it out of the file"
            )

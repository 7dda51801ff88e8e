"""Calibration as it is done today, on PEFT: the published hook method, and a plain forward and backward pass.

Both take padded batches in order, form all logits, and leave the loss to transformers. Adapter factors are float32
beside a bfloat16 model, as PEFT loads them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spectral_fast.calibration.data import IGNORED, Example

ADAPTER = "default"
Gradients = dict[str, Tensor]  # module name -> ∂L/∂s (r,)


def lora_modules(model: nn.Module) -> dict[str, Any]:
    """The model's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def directions(module: Any) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (n, r) of a module's B A, float32, by two QRs and an SVD."""
    b, a = (factor[ADAPTER].weight.detach() for factor in (module.lora_B, module.lora_A))
    wide = torch.promote_types(b.dtype, torch.float32)
    q_b, r_b = torch.linalg.qr(b.to(wide))
    q_a, r_a = torch.linalg.qr(a.to(wide).mT)
    w, _, zh = torch.linalg.svd(r_b @ r_a.mT)
    return q_b @ w, q_a @ zh.mT


def padded(examples: Sequence[Example], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The arguments of a causal language model for each batch, padded on the right."""
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        ids = [torch.tensor(x.ids) for x in batch]
        labels = [torch.tensor(x.labels) for x in batch]
        yield {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


@contextmanager
def _hooks(model: nn.Module, mask: list[Tensor], found: Gradients) -> Iterator[None]:
    """Hooks that add every batch's g to `found`; `mask` holds the current batch's attention mask."""
    inputs: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, _: Any, args: tuple[Tensor, ...], __: Any) -> None:
        inputs[name] = args[0].detach() * mask[0][..., None].to(args[0].dtype)

    def project(name: str, u: Tensor, v: Tensor, module: Any, _: Any, grads: tuple[Tensor, ...]) -> None:
        x, dy = inputs.pop(name).flatten(0, 1), grads[0].flatten(0, 1)
        g = module.scaling[ADAPTER] * ((dy.to(u.dtype) @ u) * (x.to(v.dtype) @ v)).sum(0)
        found[name] = found[name] + g if name in found else g

    # The lowest module's input needs no gradient, which these hooks do not mind.
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    try:
        for name, module in lora_modules(model).items():
            handles.append(module.register_forward_hook(partial(keep, name)))
            handles.append(module.register_full_backward_hook(partial(project, name, *directions(module))))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.enable_grad()
def by_hooks(model: nn.Module, examples: Sequence[Example], batch_size: int) -> Gradients:
    """The published method: x kept by a forward hook; in a backward hook x and ∂L/∂y projected on V and U in float32.

    Source: Tian, Chen, Han, Liao, "Spectral Surgery", arXiv:2603.03995.
    """
    mask: list[Tensor] = []
    found: Gradients = {}
    model.zero_grad()
    with _hooks(model, mask, found):
        for batch in padded(examples, batch_size):
            mask[:] = [batch["attention_mask"]]
            model(**batch, use_cache=False).loss.backward()
            model.zero_grad()
    return found


@torch.enable_grad()
def by_peft(model: nn.Module, examples: Sequence[Example], batch_size: int) -> None:
    """Forward and backward alone: what one pays for gradients of the adapter's factors."""
    model.zero_grad()
    for batch in padded(examples, batch_size):
        model(**batch, use_cache=False).loss.backward()


def from_gradients(model: nn.Module) -> Gradients:
    """Sensitivities from the gradients that `by_peft` left in B.

    By the closed form diag(T_Bᵀ Bᵀ (∂L/∂B) T_A), with U = B T_B and V = Aᵀ T_A.
    """
    found = {}
    for name, module in lora_modules(model).items():
        u, v = (x.double() for x in directions(module))
        weight, a = module.lora_B[ADAPTER].weight, module.lora_A[ADAPTER].weight.detach().double()
        assert weight.grad is not None
        t_a = torch.linalg.lstsq(a.mT, v).solution
        # U lies in the span of B, so Uᵀ takes the place of T_Bᵀ Bᵀ.
        found[name] = ((u.mT @ weight.grad.double()) * t_a.mT).sum(1)
    return found


def per_sample(model: nn.Module, examples: Sequence[Example]) -> Gradients:
    """The reference: gradients of each sample's *summed* loss, alone and without padding; (samples, r) per module."""
    rows: dict[str, list[Tensor]] = {}
    for example in examples:
        for name, g in by_hooks(model, [example], 1).items():
            rows.setdefault(name, []).append(g * example.n_labels)
    return {name: torch.stack(g) for name, g in rows.items()}


def weights(examples: Sequence[Example], batch_size: int) -> Tensor:
    """What a sample's summed loss counts in the mean over its batch's labels; (samples, 1) float32."""
    labels = torch.tensor([x.n_labels for x in examples])
    batches = torch.stack([batch.sum() for batch in labels.split(batch_size)])
    return 1 / batches.repeat_interleave(batch_size)[: len(examples), None].float()

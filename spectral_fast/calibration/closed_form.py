"""Sensitivity of an adapter in training, from the gradients that its factors carry anyway."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spectral_fast.calibration.spectral_form import adapter_layers, bare, lora_layers
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity
from spectral_fast.spectrum import Spectrum, lowrank_svd

EPS = torch.finfo(torch.float64).eps


def sensitivity_from_gradients(
    model: nn.Module, adapter_name: str = "default", modules: Iterable[str] | None = None
) -> Sensitivity:
    """g_k = ∂L/∂σ_k of an adapter in training, from the `.grad` of its B: no extra pass, nothing changed.

    With W = W₀ + c B A, ∂L/∂B = c (∂L/∂W) Aᵀ. Where v_k = Aᵀ t_k, that is V = Aᵀ T_A, the sensitivity
    c u_kᵀ (∂L/∂W) v_k is u_kᵀ (∂L/∂B) t_k, so g = diag(Uᵀ (∂L/∂B) T_A). It holds for whatever loss was
    differentiated, and for DoRA, whose magnitudes PEFT keeps out of the gradient of B. Of several backward passes
    .grad has the sum, and so has g.

    Call it between `backward()` and what changes gradients or weights: clipping, `optimizer.step()`, `zero_grad()`;
    with a gradient scaler after `unscale_()`.

    Args:
        model: PEFT model whose adapter was active in the backward pass, also within torch.compile or
            DistributedDataParallel. Of A no gradient is needed.
        adapter_name: name under which PEFT knows the adapter.
        modules: names of LoRA layers in `model.named_modules()`; by default all linear ones.

    Returns:
        Sensitivity with s and g (float64) of shape (r,) per module. A direction with σ_k = 0 has g_k = 0: where there
        is nothing, even the sign of u_k v_kᵀ is anyone's choice. So all are zero as long as B is, before the first
        step of training; a dead rank or a rank-deficient A does no harm to the other directions.

    Raises:
        ValueError: for an adapter that the model does not have; naming the module, for a name that is not a linear
            LoRA layer of this adapter, a merged adapter, a B without gradient, a LoRA variant other than DoRA, a NaN
            or an infinity.

    Source: Tian et al., "Spectral Surgery", arXiv:2603.03995, the definition of g; the chain rule.

    Example:
        >>> import torch
        >>> from peft import PeftModel
        >>> from transformers import AutoModelForCausalLM
        >>> from spectral_fast import embedded, sensitivity_from_gradients
        >>> base = AutoModelForCausalLM.from_pretrained(embedded.base_model_dir(), dtype=torch.float32)
        >>> model = PeftModel.from_pretrained(base, str(embedded.adapter_dir()), is_trainable=True)
        >>> tokens = torch.tensor([[5, 6, 7, 8]])
        >>> model(input_ids=tokens, labels=tokens).loss.backward()
        >>> measured = sensitivity_from_gradients(model)
        >>> len(measured.modules), next(iter(measured.modules.values())).g.shape
        (20, torch.Size([32]))
    """
    model = bare(model)
    names = adapter_layers(model, adapter_name, modules)
    layers = lora_layers(model, adapter_name)
    for name in names:
        _check(name, layers[name], adapter_name)
    bs = [layers[name].lora_B[adapter_name].weight for name in names]
    as_ = [layers[name].lora_A[adapter_name].weight.detach() for name in names]
    spectra = lowrank_svd(bs, as_, names)
    measured = {}
    for name, b, a, spectrum in zip(names, bs, as_, spectra, strict=True):
        g = _closed_form(b.detach(), a, b.grad, spectrum)
        if not g.isfinite().all():
            raise ValueError(f"{name}: the gradient of B is NaN or infinite; the loss overflowed in this step")
        measured[name] = ModuleSensitivity(spectrum.s.cpu(), g.cpu())
    return Sensitivity(measured)


def _check(name: str, layer: Any, adapter_name: str) -> None:
    variant = type(layer.lora_variant.get(adapter_name)).__name__
    if variant not in {"NoneType", "DoraLinearVariant"}:
        raise ValueError(f"{name}: the LoRA variant {variant} is not a function of B A; only LoRA and DoRA are")
    if adapter_name in layer.merged_adapters:
        raise ValueError(f"{name}: adapter {adapter_name!r} is merged into the base weights; call unmerge_adapter()")
    if layer.lora_B[adapter_name].weight.grad is None:
        raise ValueError(
            f"{name}: lora_B of adapter {adapter_name!r} has no .grad; call this after backward() and before "
            "zero_grad(), on a trainable and active adapter"
        )


def _closed_form(b: Tensor, a: Tensor, grad: Tensor, spectrum: Spectrum) -> Tensor:
    f = spectrum.factored
    t_a = f.t_a
    if f.basis_a.data_ptr() != a.data_ptr():  # V = Qᵀ Z with Q an orthonormal basis of A's rows: A = Rᵀ Q, R T_A = Z
        t_a = torch.linalg.pinv(f.basis_a @ a.double().mT) @ f.t_a
    g = ((f.basis_b.double().mT @ grad.double() @ t_a) * f.t_b).sum(0)
    # The same to rounding as a zero: dead ranks come out of a QR as a few ε of the factors.
    zero = spectrum.s <= len(spectrum.s) * EPS * b.double().norm() * a.double().norm()
    return g.where(~zero, 0.0)

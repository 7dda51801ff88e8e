"""PEFT's `add_weighted_adapter` by "svd", with its own inside and with the compact one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import TINY, Adapter
from benchmarks.tasks import PEFT
from benchmarks.workloads import Candidate, Workload
from spectral_fast.bench.gate import WrongResult
from spectral_fast.integrations.peft import fast_svd
from spectral_fast.kernels.lowrank_svd import reference

MERGED, SAME, DECAY = "merged", 1e-5, 0.8
ADAPTERS, WEIGHTS = ["one", "two"], [0.7, 0.5]


def weighted(case: Adapter, names: Sequence[str]) -> Workload:
    """Two adapters into one of their rank. PEFT as it is is given one layer, times their number.

    Floor: both are read and the merged one written; half of a Gram matrix of 2 r columns takes 4 l r² operations of
    factors of length l, and 4 l r² their product with a 2 r × r matrix.
    """
    small, layer = (model_of(replace(case, model=replace(model, layers=1))) for model in (TINY, case.model))

    def candidates() -> Iterator[Candidate]:
        for name in names:
            own = name == PEFT
            model, share = (layer, 1 / case.model.layers) if own else (model_of(case), 1.0)
            how = nullcontext if own else fast_svd
            check = partial(check_merged, name, model)
            yield Candidate(name, partial(merge, small, how), partial(merge, model, how), check, share)

    lengths = sum(m + n for m, n in case.shapes().values())
    x = torch.ones(2**26)
    return Workload(
        candidates(), [(torch.empty_like(x), x)], 3 * case.nbytes, 8 * lengths * case.rank**2, (torch.float32,)
    )


def model_of(case: Adapter) -> Any:
    """A Llama of random weights and with few words that carries two random adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp = case.model.shapes["down_proj"]
    heads, kv = hidden // 64, case.model.shapes["k_proj"][0] // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=case.model.layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=32,
    )
    lora = LoraConfig(r=case.rank, target_modules=list(case.targets), init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name=ADAPTERS[0])
    model.add_adapter(ADAPTERS[1], lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if (
                "lora_B" in name
            ):  # spectra fall off, as trained ones do: with a flat one the best of a rank is ill-defined
                weight *= DECAY ** torch.arange(case.rank)
    return model


def merge(model: Any, how: Any) -> Any:
    """The call, after what an earlier one left is gone."""
    if MERGED in model.peft_config:
        model.delete_adapter(MERGED)
    with how():
        model.add_weighted_adapter(ADAPTERS, WEIGHTS, MERGED, combination_type="svd")
    return model


def check_merged(name: str, model: Any, _: Any) -> None:
    """‖B A − the best of its rank‖ by QR in float64, over the latter's norm."""
    for path, layer in model.named_modules():
        if getattr(layer, "lora_A", None) and MERGED in layer.lora_A:
            parts = [factors(layer, adapter) for adapter in ADAPTERS]
            b = torch.cat([w * layer.scaling[x] * b for w, x, (b, _) in zip(WEIGHTS, ADAPTERS, parts, strict=True)], 1)
            found = reference.factor(b, torch.cat([a for _, a in parts]), path)
            b, a = factors(layer, MERGED)
            k = b.shape[1]
            best_b = found.basis_b @ (found.t_b[:, :k] * found.s[:k])
            r_b = torch.linalg.qr(torch.cat([best_b, -b], 1), mode="r").R
            r_a = torch.linalg.qr(torch.cat([found.t_a[:, :k].mT @ found.basis_a, a]).mT, mode="r").R
            off = (r_b @ r_a.mT).norm() / found.s[:k].norm()
            if not off <= SAME:
                raise WrongResult(f"{name}, {path}: off by {off:.3g} of the best of rank {k}, wanted {SAME}")


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """B and A in float64."""
    return layer.lora_B[adapter].weight.detach().double(), layer.lora_A[adapter].weight.detach().double()

"""What PEFT does with dense updates, done with their factors: the insides that `integrations.peft` gives it.

Each function takes what PEFT's own takes, and hands what it cannot do to `originals`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from spectral_fast.functional import svd_lowrank_factors

Pair = tuple[Tensor, Tensor]
# The functions as PEFT has them, by name: filled in while the compact route is on.
originals: dict[str, Callable[..., Any]] = {}
LARGEST = 0.5  # columns of the factors over the rank of a full matrix: above, the dense SVD is not the dearer one
_FLOATS = (torch.float32, torch.float64)  # PEFT's SVDs know no others


def merged(
    model: Any,
    combination_type: str,
    adapters: list[str],
    weights: list[float],
    new_rank: int,
    target: Any,
    others: dict[str, Any],
) -> Pair:
    """`add_weighted_adapter` of a layer by "svd": A = Vh and B = U diag(S) of Σ w_i s_i B_i A_i, cut to the rank.

    What `full_matrices` adds is cut off again. Clamped entries depend on the signs of singular vectors, and drivers are
    of the dense SVD: both stay with PEFT. `others` are the other arguments, by name.
    """
    pairs = [
        (weight * target.scaling[adapter] * pair[0], pair[1])
        for adapter, weight in zip(adapters, weights, strict=False)
        if (pair := _lora_factors(target, adapter)) is not None
    ]
    present = sum(adapter in target.lora_A or adapter in target.lora_embedding_A for adapter in adapters)
    if (
        combination_type == "svd"
        and others["clamp"] is None
        and others["driver"] is None
        and len(pairs) == present > 0
        and all(x.dtype in _FLOATS for pair in pairs for x in pair)
        and new_rank <= (full := min(len(pairs[0][0]), pairs[0][1].shape[1]))
        and sum(b.shape[1] for b, _ in pairs) <= LARGEST * full
    ):
        b, a = (torch.cat(factors, dim) for factors, dim in zip(zip(*pairs, strict=True), (1, 0), strict=True))
        u, s, vh = svd_lowrank_factors(b.detach(), a.detach())
        return _of_rank(u * s, vh, new_rank)[::-1]
    original = originals["_svd_generalized_task_arithmetic_weighted_adapter"]
    found: Pair = original(model, combination_type, adapters, weights, new_rank, target, **others)
    return found


def converted(module: Any, rank: float, adapter_name: str) -> tuple[Tensor, Tensor, int]:
    """`convert_to_lora` of a layer: A = Vh, B = U diag(S), and the rank, as given or reached at a share of ΣS²."""
    from peft.tuners.lora.conversion import _find_cutoff_index
    from transformers.pytorch_utils import Conv1D

    pair = None if torch.compiler.is_compiling() else delta_factors(module, adapter_name)
    if pair is not None:
        dtype = torch.promote_types(pair[0].dtype, pair[1].dtype)
        u, s, vh = svd_lowrank_factors(*(x.detach().float() for x in pair))
        effective = rank if isinstance(rank, int) else _find_cutoff_index(s, threshold=rank)
        if 0 < effective <= min(u.shape[0], vh.shape[1]):  # else it is for PEFT to refuse
            b, a = (x.to(dtype) for x in _of_rank(u * s, vh, effective))
            if isinstance(module.get_base_layer(), Conv1D):
                b, a = a.T, b.T
            return a.contiguous(), b.contiguous(), effective
    found: tuple[Tensor, Tensor, int] = originals["_convert_module_to_lora"](module, rank, adapter_name)
    return found


def reduced(
    peft_model: Any,
    old_adapter_name: str,
    new_adapter_name: str,
    top_k: int,
    threshold_epsilon: float,
    mitigation_lambda: float,
    logging_sink: Callable[..., Any] | None,
) -> None:
    """`reduce_intruder_dimension`: the SVD of what is left of ΔW from its factors and the intruders'.

    With W + ΔW = U S Vh, and i the first directions of it that no left singular vector of W is near to, the new factors
    are √ of the SVD of ΔW - (1 - λ) Σ_i S_i u_i v_iᵀ over the scaling, cut to the adapter's rank. The SVDs of W and
    of W + ΔW are dense, as in PEFT. So is the third where W + ΔW is rounded to half precision, which is
    of no low rank, and for layers whose weight is stored transposed.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers = {name: layer for name, layer in peft_model.named_modules() if isinstance(layer, LoraLayer)}
    if peft_model.peft_type != "LORA" or not all(_plain(layer, old_adapter_name) for layer in layers.values()):
        originals["reduce_intruder_dimension"](
            peft_model,
            old_adapter_name,
            new_adapter_name,
            top_k,
            threshold_epsilon,
            mitigation_lambda,
            logging_sink,
        )
        return
    tell = logging_sink or (lambda *_: None)
    peft_model.add_adapter(new_adapter_name, peft_model.peft_config[old_adapter_name])
    for name, layer in layers.items():
        old, new = ([factor[key].weight for factor in (layer.lora_B, layer.lora_A)] for key in
                    (old_adapter_name, new_adapter_name))  # fmt: skip
        weight = layer.get_base_layer().weight.data
        total = weight + layer.get_delta_weight(old_adapter_name)
        base = torch.linalg.svd(weight.to(total.dtype), full_matrices=False).U
        u, s, vh = (x.detach() for x in torch.linalg.svd(total, full_matrices=False))
        nearest = (u[:, :top_k].T @ base).abs().amax(1)
        intruders = torch.where(nearest < threshold_epsilon)[0]
        if len(intruders):
            tell(f"{name}: Intruders: {len(intruders)}")
            lost = (mitigation_lambda - 1) / layer.scaling[old_adapter_name] * s[intruders]
            b = torch.cat([old[0].data.to(total.dtype), u[:, intruders] * lost], 1)
            a = torch.cat([old[1].data.to(total.dtype), vh[intruders]], 0)
            left = svd_lowrank_factors(b, a)
            r, dtype = layer.r[old_adapter_name], total.dtype if weight.dtype in _FLOATS else weight.dtype
            root = left.S[:r].sqrt()
            new[0].data = (left.U[:, :r] * root).to(dtype)
            new[1].data = (root.unsqueeze(1) * left.Vh[:r]).to(dtype)
        else:
            tell(f"{name}: No intruders")
            for mine, its in zip(new, old, strict=True):
                mine.data = its.data.clone()
    tell(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def delta_factors(module: Any, adapter: str) -> Pair | None:
    """(b, a) with b a = get_delta_weight, transposed where it is; None where it has no small factors that are known."""
    own = getattr(type(module), "get_delta_weight", None)
    factors = next((factors for path, factors in DELTAS.items() if find(path) is own), None)
    pair = None if factors is None else factors(module, adapter)
    if pair is None or not all(_usable(x) for x in pair):
        return None
    b, a = pair
    if b.shape[1] > LARGEST * min(len(b), a.shape[1]):
        return None
    return (a.T, b.T) if getattr(module, "fan_in_fan_out", False) else (b, a)


def find(path: str) -> Any:
    """A function by `module:name` or `module:class.name`.

    Raises:
        AttributeError, ImportError: it is not there.
    """
    module, _, names = path.partition(":")
    return attrgetter(names)(import_module(module))


def _lora(module: Any, adapter: str) -> Pair | None:
    pair = _lora_factors(module, adapter)
    return None if pair is None else (pair[0] * module.scaling[adapter], pair[1])


def _lora_factors(layer: Any, adapter: str) -> Pair | None:
    """B and A of a linear layer or an embedding; None where there are none, or ΔW is something else."""
    from peft.tuners.lora.layer import Embedding, Linear

    own = getattr(type(layer), "get_delta_weight", None)
    if own is Linear.get_delta_weight and adapter in layer.lora_A:
        pair = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    elif own is Embedding.get_delta_weight and adapter in layer.lora_embedding_A:
        pair = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    else:
        return None
    return pair if all(_usable(x) for x in pair) else None


def _vera(module: Any, adapter: str) -> Pair:
    over, under = module.vera_lambda_b[adapter], module.vera_lambda_d[adapter]
    b = module.vera_B[adapter][: module.out_features].to(over.device)
    a = module.vera_A[adapter][:, : module.in_features].to(over.device)
    return over.unsqueeze(1) * b, under.unsqueeze(1) * a


def _delora(module: Any, adapter: str) -> Pair:
    a, b = module.delora_A[adapter], module.delora_B[adapter]
    lengths = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    return b * (module.delora_lambda[adapter] / module.r[adapter] / lengths), a * module.delora_w_norm[adapter]


def _vblora(module: Any, adapter: str) -> Pair:
    logits = module.vblora_logits_A[adapter]
    a, b = module._get_lora_matrices(adapter, logits.device.type == "cpu" and logits.dtype not in _FLOATS)
    return b, a


def _loha(module: Any, adapter: str) -> Pair | None:
    """(X Y) ∘ (Z W) = Σ_ij (x_i ∘ z_j) (y_i ∘ w_j)ᵀ."""
    if adapter in module.hada_t1 or module.get_base_layer().weight.ndim != 2:
        return None
    x, y, z, w = (getattr(module, f"hada_w{part}")[adapter] for part in ("1_a", "1_b", "2_a", "2_b"))
    b = (x.unsqueeze(2) * z.unsqueeze(1)).flatten(1)
    return b * module.scaling[adapter], (y.unsqueeze(1) * w.unsqueeze(0)).flatten(0, 1)


def _lokr(module: Any, adapter: str) -> Pair | None:
    """X ⊗ (Y Z) = (X ⊗ Y) (1 ⊗ Z)."""
    if adapter not in module.lokr_w2_a or adapter in module.lokr_t2 or module.get_base_layer().weight.ndim != 2:
        return None
    x = module.lokr_w1[adapter] if adapter in module.lokr_w1 else module.lokr_w1_a[adapter] @ module.lokr_w1_b[adapter]
    y, z = module.lokr_w2_a[adapter], module.lokr_w2_b[adapter]
    return torch.kron(x * module.scaling[adapter], y), torch.kron(torch.eye(x.shape[1]).to(z), z)


# PEFT's functions that form an update -> the same as two factors; their sources are checked, see `integrations.peft`.
DELTAS: dict[str, Callable[[Any, str], Pair | None]] = {
    "peft.tuners.lora.layer:Linear.get_delta_weight": _lora,
    "peft.tuners.vera.layer:Linear.get_delta_weight": _vera,
    "peft.tuners.delora.layer:DeloraLayer.get_delta_weight": _delora,
    "peft.tuners.vblora.layer:Linear.get_delta_weight": _vblora,
    "peft.tuners.loha.layer:LoHaLayer.get_delta_weight": _loha,
    "peft.tuners.lokr.layer:LoKrLayer.get_delta_weight": _lokr,
}


def _usable(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and x.device.type in ("cpu", "cuda")


def _plain(layer: Any, adapter: str) -> bool:
    """Whether the layer is W + s B A with W as stored, and no rounding of the sum to half precision."""
    from peft.tuners.lora.layer import Linear

    if type(layer).get_delta_weight is not Linear.get_delta_weight or layer.fan_in_fan_out:
        return False
    pair, weight = _lora_factors(layer, adapter), getattr(layer.get_base_layer(), "weight", None)
    return (
        pair is not None
        and weight is not None
        and _usable(weight)
        and torch.promote_types(weight.dtype, pair[0].dtype) in _FLOATS
        and layer.r[adapter] <= LARGEST * min(weight.shape)
    )


def _of_rank(b: Tensor, a: Tensor, rank: int) -> Pair:
    """The first directions, or more by zeros in B and further orthonormal rows in A, as a dense SVD has them."""
    missing = rank - len(a)
    if missing > 0:
        random = torch.randn(missing, a.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(a)
        rows = torch.linalg.qr(torch.cat([a, random]).T).Q.T[len(a) :]
        b, a = nn.functional.pad(b, (0, missing)), torch.cat([a, rows])
    return b[:, :rank].contiguous(), a[:rank].contiguous()

"""Scores of the channels of a Llama-like layer: from their true activations, and from rank-8 factors of the weights.

SparseLoRA computes, for each batch, only the channels that an estimator expects to be active. Of a feed-forward block
these are rows of gate and up and columns of down; of attention, rows of q and k, and rows of v with columns of o.

Source: Khaki et al., "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity", arXiv:2506.16500.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ORACLE, SVD, SVD_TOKENS, WANDA, RANDOM = "oracle", "svd", "svd_per_token", "wanda", "random"
FFN, QK, VO = "ffn", "qk", "vo"
Scores = dict[str, Tensor]
# More directions than wanted, and power iterations: the error of the factors is then within 1e-4 of the least, where
# the singular values are as close together as in trained weights.
_SPARE, _ITERATIONS = 24, 8


@dataclass(frozen=True)
class LowRank:
    """A linear layer with A = U_r √S_r (out, r) and B = √S_r V_rᵀ (r, in) for its weight, and its own bias."""

    a: Tensor
    b: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Any, rank: int) -> LowRank:
        """The best approximation of that rank, by subspace iteration."""
        w = layer.weight.detach().float()
        rank = min(rank, *w.shape)
        with torch.random.fork_rng(devices=[w.device] if w.device.type == "cuda" else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(w, q=min(rank + _SPARE, *w.shape), niter=_ITERATIONS)
        root = s[:rank].sqrt()
        bias = None if layer.bias is None else layer.bias.detach().float()
        return cls(u[:, :rank] * root, (v[:, :rank] * root).mT.contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer is expected to give for x (tokens, in): x Bᵀ Aᵀ + bias."""
        y = (x @ self.b.mT) @ self.a.mT
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Seen:
    """What a batch did to a block, at the tokens that count, in float32.

    Attributes:
        x: input (tokens, in).
        mean: average of x over the tokens of each sample (samples, in).
        outputs: name of a layer -> its output or, for down_proj, its input (tokens, channels).
    """

    x: Tensor
    mean: Tensor
    outputs: Mapping[str, Tensor]


class FeedForward:
    """A block with gate_proj, up_proj and down_proj. Its channels are those between."""

    watched = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, name: str, module: Any, rank: int) -> None:
        self.name, self.module = name, module
        self.gate, self.up = (LowRank.of(layer, rank) for layer in (module.gate_proj, module.up_proj))
        self.activation: Callable[[Tensor], Tensor] = module.act_fn

    def scores(self, seen: Seen) -> Iterator[tuple[str, Scores]]:
        """‖h_j‖ over tokens for h = act(gate) · up; predicted, and by Wanda: Σ_i |W_ij| ‖h_j‖ / Σ_j |W_ij| ‖h_j‖."""
        norms = _norms(seen.outputs["down_proj"])
        weighted = self.module.down_proj.weight.detach().float().abs() * norms
        yield (
            FFN,
            {
                ORACLE: norms,
                SVD: self._predicted(seen.mean),
                SVD_TOKENS: self._predicted(seen.x),
                WANDA: (weighted / weighted.sum(1, keepdim=True).clamp_min(1e-30)).sum(0),
            },
        )

    def _predicted(self, x: Tensor) -> Tensor:
        return _norms(self.activation(self.gate(x)) * self.up(x))


class Attention:
    """A block with q_proj, k_proj and v_proj. Its channels are those of k and v; query heads of a group share them."""

    watched = ("q_proj", "k_proj", "v_proj")

    def __init__(self, name: str, module: Any, rank: int) -> None:
        self.name, self.module = name, module
        self.q, self.k, self.v = (LowRank.of(getattr(module, layer), rank) for layer in self.watched)
        groups = module.q_proj.weight.shape[0] // module.k_proj.weight.shape[0]
        self.heads = (-1, groups, int(module.head_dim))

    def scores(self, seen: Seen) -> Iterator[tuple[str, Scores]]:
        """‖q_c‖ ‖k_c‖, the first as a mean over the query heads of a group, and ‖v_c‖; before rotary positions."""
        q, k, v = (seen.outputs[layer] for layer in self.watched)
        inputs = {SVD: seen.mean, SVD_TOKENS: seen.x}
        products = {how: self._product(self.q(x), self.k(x)) for how, x in inputs.items()}
        yield QK, {ORACLE: self._product(q, k), **products}
        yield VO, {ORACLE: _norms(v), **{how: _norms(self.v(x)) for how, x in inputs.items()}}

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        return _norms(q).view(self.heads).mean(1).flatten() * _norms(k)


def _norms(y: Tensor) -> Tensor:
    """2-norm of every channel over the tokens of y (tokens, channels)."""
    norms: Tensor = torch.linalg.vector_norm(y, dim=0)
    return norms


Block = FeedForward | Attention


def find_blocks(model: nn.Module, rank: int) -> list[Block]:
    """The feed-forward and attention blocks of a Llama-like model, in its order.

    Raises:
        ValueError: there is none, or a weight has NaN or infinity, named.
    """
    found: list[Block] = []
    for name, module in model.named_modules():
        for kind in (Attention, FeedForward):
            layers = [getattr(module, layer, None) for layer in kind.watched]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                for layer in kind.watched:
                    if not getattr(module, layer).weight.isfinite().all():
                        raise ValueError(f"{name}.{layer}.weight has NaN or infinite values: nothing can be predicted")
                found.append(kind(name, module, rank))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no blocks of linear layers named {', '.join(FeedForward.watched)} nor "
            f"{', '.join(Attention.watched)}: the predictor is for Llama-like models"
        )
    return found

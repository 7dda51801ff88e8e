"""The gate of a name."""

from __future__ import annotations

from typing import Any

from spectral_fast.training.gate.base import Gate, RandomControl
from spectral_fast.training.gate.head_gradient import HeadGradientGate
from spectral_fast.training.gate.loss_floor import LossFloorGate, NoveltyAndLossGate
from spectral_fast.training.gate.names import KINDS


def open_gate(
    kind: str, d_hidden: int, vocab_size: int, *, target_novelty: float, burn_in: int, seed: int, **novelty: Any
) -> Gate:
    """A gate of one of the `KINDS`.

    Args:
        kind: its name.
        d_hidden: columns of the output embedding.
        vocab_size: its rows.
        target_novelty: the share of micro-batches to accept, of any kind.
        burn_in: micro-batches that are accepted before any decision.
        seed: of the hashes and decisions.
        novelty: more of `HeadGradientGate`'s, for the kinds that look at novelty.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "loss_floor":
        return LossFloorGate(target_novelty, burn_in, seed)
    if kind == "random":
        return RandomControl(target_novelty, burn_in, seed)
    named = {"target_novelty": target_novelty, "burn_in": burn_in, "seed": seed, **novelty}
    if kind == "novelty":
        return HeadGradientGate(d_hidden, vocab_size, **named)
    if kind == "both":
        return NoveltyAndLossGate(d_hidden, vocab_size, **named)
    raise ValueError(f"a gate must be one of {', '.join(KINDS)}; got {kind!r}")

"""The subspace gate: is a micro-batch's gradient at the output embedding one that was not seen before?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from spectral_fast.kernels.head_sketch import IGNORED, Hashes, head_sketch, head_sketch_from_weight
from spectral_fast.training.gate import source
from spectral_fast.training.gate.base import Gate, Mean, alone
from spectral_fast.training.gate.controllers import SourceThreshold, Threshold
from spectral_fast.training.gate.frequent_directions import FrequentDirections
from spectral_fast.training.gate.names import SOURCE

NOTHING = 1e-8  # a sketch shorter than this counts as zero
CONTROLLERS = {"corrected": Threshold, SOURCE: SourceThreshold}


class HeadGradientGate(Gate):
    """Accepts a micro-batch with probability sigmoid(beta (novelty − tau)), so that a wanted share is accepted.

    The gradient of the loss with respect to the output embedding is Σ h_t ⊗ e_t over the tokens t, h_t the hidden state
    and e_t the error of the predicted probabilities. TensorSketch maps it to m numbers z whose inner products are, on
    average over the hashes, those of the gradients. Novelty is 1 − ‖Uᵀz‖² for z of length 1 and U the directions in
    which accepted micro-batches went: 1 where it goes nowhere they went.

    For training loops: per micro-batch z = `embed`, `novelty`, `accept`, after a backward pass `update`, and `step` in
    any case; or, in the same places, `decide`, `accepted` and `stepped`, which every gate has.

    Args:
        d_hidden, vocab_size: columns and rows of the output embedding.
        m: length of the sketch.
        k: most directions that are remembered.
        target_novelty: the share of micro-batches to accept.
        target_novelty_scaler: beta; `novelty_scaler` is another name of it.
        novelty_ema_rate: of the steps of tau.
        burn_in: micro-batches that are accepted before any decision.
        seed: of the hashes (seed and seed + 1) and of the decisions.
        device: where hidden states and logits are; the hashes go there. The subspace stays on the CPU.
        reorth_every: see `FrequentDirections`.
        k_topk: how many largest logits of a token are in its error; the label's is in any case.
        fd_mode: "liberty" or "orthonormal", see `FrequentDirections`; by default liberty.
        controller: "corrected" or "source", see `controllers`; by default corrected.
        shift_labels: pair logits at t with labels at t + 1, as causal models do; by default true. False for labels
            that are aligned already.
        compat: "source" for all choices of the original: of the three defaults above (orthonormal, source, not
            shifted), and of the errors, see `source`.
        novelty_scaler: see target_novelty_scaler.

    Attributes:
        tau: the threshold.
        sketch: the `FrequentDirections`.
        last_novelty: of the last `novelty`; 1 before.

    Raises:
        ValueError: a size below 1, a share or rate out of its range, an unknown name, or both names of beta.

    Source: TensorSketch: Pham and Pagh, KDD 2013.
    """

    def __init__(
        self,
        d_hidden: int,
        vocab_size: int,
        m: int = 512,
        k: int = 64,
        target_novelty: float = 0.30,
        target_novelty_scaler: float | None = None,
        novelty_ema_rate: float = 0.01,
        burn_in: int = 2000,
        seed: int = 0,
        device: torch.device | str | None = None,
        reorth_every: int = 128,
        k_topk: int = 64,
        *,
        fd_mode: str | None = None,
        controller: str | None = None,
        shift_labels: bool | None = None,
        compat: str | None = None,
        novelty_scaler: float | None = None,
    ) -> None:
        super().__init__(target_novelty, burn_in, seed)
        if compat not in (None, SOURCE):
            raise ValueError(f"compat must be {SOURCE!r} or None; got {compat!r}")
        self.compat = compat == SOURCE
        controller = controller or (SOURCE if self.compat else "corrected")
        if controller not in CONTROLLERS:
            raise ValueError(f"controller must be one of {', '.join(CONTROLLERS)}; got {controller!r}")
        if target_novelty_scaler is not None and novelty_scaler is not None:
            raise ValueError("target_novelty_scaler and novelty_scaler are two names of one thing; give one")
        given = target_novelty_scaler if novelty_scaler is None else novelty_scaler
        self.scaler = 10.0 if given is None else float(given)
        if not (self.scaler > 0 and novelty_ema_rate >= 0):
            raise ValueError(
                f"target_novelty_scaler must be > 0 and novelty_ema_rate >= 0; got {self.scaler:g}, {novelty_ema_rate}"
            )
        if min(d_hidden, vocab_size, k_topk) < 1:
            raise ValueError(f"d_hidden, vocab_size and k_topk must be >= 1; got {d_hidden}, {vocab_size}, {k_topk}")
        self.sketch = FrequentDirections(m, k, fd_mode or ("orthonormal" if self.compat else "liberty"), reorth_every)
        self.controller = CONTROLLERS[controller](self.target, float(novelty_ema_rate))
        self.shift_labels = not self.compat if shift_labels is None else shift_labels
        self.k_topk = min(k_topk, max(vocab_size - 1, 1))
        self.hashes = Hashes.draw(d_hidden, vocab_size, m, seed)
        if device is not None:
            self.hashes = self.hashes.to(device)
        self.d_hidden, self.vocab_size = d_hidden, vocab_size
        self.last_novelty, self._counted = 1.0, 0
        self._z = torch.zeros(m)

    @property
    def tau(self) -> float:
        """The threshold."""
        return self.controller.tau

    def embed(self, hidden: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The sketch z of a micro-batch's gradient, scaled to length 1.

        Args:
            hidden: (batch, tokens, d_hidden), or (tokens, d_hidden) of one sequence: what enters the output embedding.
            logits: the same with vocab_size.
            labels: (batch, tokens) or (tokens,), int64, -100 where a token has none.

        Returns:
            (m,) float32; zeros if no token has a label, or the sketch is shorter than 1e-8.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(hidden, labels)
        if logits.shape != (*hidden.shape[:-1], self.vocab_size):
            raise ValueError(
                f"logits must be {(*hidden.shape[:-1], self.vocab_size)}, as hidden states and vocab_size say; got "
                f"{tuple(logits.shape)}"
            )
        h, scores = hidden.detach().flatten(0, -2), logits.detach().flatten(0, -2)
        sketch = source.head_sketch if self.compat else head_sketch
        return unit(sketch(h, scores, self._aligned(labels), self._hashes(hidden), self.k_topk))

    def embed_from_weight(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same from the output embedding's weight (vocab_size, d_hidden): logits are never stored.

        Raises:
            ValueError: shapes do not fit; or compat="source", whose probabilities need other sums.
        """
        if self.compat:
            raise ValueError('embed_from_weight is not for compat="source"; give the logits to embed')
        self._check(hidden, labels)
        if weight.shape != (self.vocab_size, self.d_hidden):
            raise ValueError(f"weight must be {(self.vocab_size, self.d_hidden)}; got {tuple(weight.shape)}")
        h, hashes = hidden.detach().flatten(0, -2), self._hashes(hidden)
        bias = None if bias is None else bias.detach()
        return unit(head_sketch_from_weight(h, weight.detach(), self._aligned(labels), hashes, self.k_topk, bias=bias))

    def novelty(self, z: Tensor) -> float:
        """1 − ‖Uᵀz‖² of a sketch of length 1: 1 if nothing is remembered, 0 for a sketch of zeros."""
        if self.sketch.updates == 0:
            self.last_novelty = 1.0
        elif float(z.norm()) < NOTHING:
            self.last_novelty = 0.0
        else:
            self.last_novelty = 1.0 - min(max(self.sketch.captured(z), 0.0), 1.0)
        return self.last_novelty

    def accept(self, novelty: float) -> bool:
        """A draw with probability sigmoid(beta (novelty − tau)); true, and no draw, during the burn-in."""
        if self.burning_in:
            return True
        return self._draw() < float(torch.tensor(self.scaler * (novelty - self.tau), dtype=torch.float64).sigmoid())

    def update(self, z: Tensor) -> None:
        """Remember the direction of an accepted micro-batch, and count it."""
        self.sketch.update(z)
        self.accepted_count += 1

    def step(self) -> None:
        """A micro-batch is over: count it and, after the burn-in, move tau."""
        self.step_count += 1
        if self.step_count > self.burn_in:
            self.controller.step(self.accepted_count > self._counted, self.acceptance_rate())
        self._counted = self.accepted_count

    def reset(self) -> None:
        """Forget the directions and the counters; tau and the random generator stay."""
        self.sketch.reset()
        self.step_count = self.accepted_count = self._counted = 0

    def decide(self, loss: float, hidden: Tensor, logits: Tensor, labels: Tensor, mean: Mean = alone) -> bool:  # noqa: ARG002
        """By novelty; the mean of the ranks' sketches is scaled to length 1."""
        z = self._embedded(hidden, logits, labels)
        self._z = z if mean is alone else unit(mean(z))
        return self.accept(self.novelty(self._z))

    def _embedded(self, hidden: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return (self.embed if logits.ndim == hidden.ndim else self.embed_from_weight)(hidden, logits, labels)

    def accepted(self) -> None:
        """`update` by the sketch of the last `decide`."""
        self.update(self._z)

    def stepped(self) -> None:
        """`step`."""
        self.step()

    def metrics(self) -> dict[str, float]:
        """Novelty and threshold."""
        return {"novelty": self.last_novelty, "current_novelty_threshold": self.tau}

    def state_dict(self) -> dict[str, Any]:
        """All that changes, and what must be the same where it is loaded."""
        own = {"sketch": self.sketch.state_dict(), "controller": asdict(self.controller), "counted": self._counted}
        return {**super().state_dict(), **own, "made": self._made()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the gate that gave it.

        Raises:
            ValueError: it was made with other sizes, seed or mode.
        """
        super().load_state_dict(state)
        for name, value in self._made().items():
            if state["made"][name] != value:
                raise ValueError(f"the gate was made with {name} = {state['made'][name]}, this one has {value}")
        self.sketch.load_state_dict(state["sketch"])
        self.controller.tau, self.controller.accepted = (float(state["controller"][x]) for x in ("tau", "accepted"))
        self._counted = int(state["counted"])

    def _made(self) -> Mapping[str, Any]:
        """What a subspace means nothing without."""
        return {
            "d_hidden": self.d_hidden,
            "vocab_size": self.vocab_size,
            "m": self.sketch.m,
            "k": self.sketch.k,
            "seed": self.seed,
            "k_topk": self.k_topk,
            "fd_mode": self.sketch.mode,
            "shift_labels": self.shift_labels,
            "compat": self.compat,
        }

    def _check(self, hidden: Tensor, labels: Tensor) -> None:
        if hidden.ndim not in (2, 3) or hidden.shape[-1] != self.d_hidden:
            raise ValueError(f"hidden must be (batch, tokens, {self.d_hidden}); got {tuple(hidden.shape)}")
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(f"labels must be {tuple(hidden.shape[:-1])}, as hidden is; got {tuple(labels.shape)}")

    def _aligned(self, labels: Tensor) -> Tensor:
        """A label per row of logits."""
        if not self.shift_labels:
            return labels.flatten()
        # Shifting labels, with nothing to predict at the end, copies less than cutting hidden states and logits.
        return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORED)], -1).flatten()

    def _hashes(self, hidden: Tensor) -> Hashes:
        if self.hashes.bucket_h.device != hidden.device:
            self.hashes = self.hashes.to(hidden.device)
        return self.hashes


def unit(z: Tensor) -> Tensor:
    """Scaled to length 1; zeros if it is shorter than 1e-8."""
    length = z.norm()
    return torch.where(length < NOTHING, torch.zeros_like(z), z / length)

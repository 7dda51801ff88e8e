"""Training that learns from a micro-batch only if a gate accepts it, by transformers' Trainer or one made from it.

    trainer = GatedTrainer(model, args, train_dataset=rows, gate=HeadGradientGate(d_hidden, vocab_size))

One forward pass serves the loss and the gate. On a rejection its graph is dropped: there is no backward pass. A window
of `gradient_accumulation_steps` micro-batches becomes a step of the optimizer and of the learning rate's schedule if
any of it was accepted, with the mean gradient over the tokens of those. The loss in the logs is that of all
micro-batches, so that it can be compared with that of a training without a gate.

With several processes (DDP) the gate sees the sketch and the loss of all, and all follow the first one's decision.
Gradients are averaged when a window ends, once, not by DDP's hooks: a rejected micro-batch never reaches them.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch import distributed as dist

from spectral_fast.training.folder import GATE_METRICS, GATE_STATE
from spectral_fast.training.gate import Gate, HeadGradientGate
from spectral_fast.training.head import Head
from spectral_fast.training.history import History

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class _WindowOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """The accelerator's, which rests after a window of which nothing was accepted, as after an overflow."""

    resting = False

    def step(self, closure: Any = None) -> None:
        """A step, or none."""
        if not self.resting:
            super().step(closure)

    @property
    def step_was_skipped(self) -> bool:
        """Asked before the schedule goes on."""
        return self.resting or bool(super().step_was_skipped)


class _Gated:
    """A trainer that asks a gate before each backward pass.

    Args:
        gate: a `Gate`.
        max_optimizer_steps: steps of the optimizer after which the training ends, and over which the learning rate's
            schedule goes; without it both follow `max_steps` or the epochs, which count windows, rejected ones too.
        others: those of the trainer without a gate.

    Raises:
        TypeError: `gate` is none.
        RuntimeError: the training is by DeepSpeed, FSDP, or one process with several GPUs.
        ValueError: the gate is of other sizes than the model, or an option does not go with one.
    """

    def __init__(self: Any, *args: Any, gate: Gate, max_optimizer_steps: int | None = None, **kwargs: Any) -> None:
        if not isinstance(gate, Gate):
            raise TypeError(f"gate must be a Gate, such as HeadGradientGate; got {gate!r:.80}")
        super().__init__(*args, **kwargs)
        self._refuse_what_is_not_plain()
        self.gate, self.history, self.max_optimizer_steps = gate, History(), max_optimizer_steps
        self._head = Head(self.model)
        has = (self._head.d_hidden, self._head.vocab_size)
        if isinstance(gate, HeadGradientGate) and (gate.d_hidden, gate.vocab_size) != has:
            raise ValueError(
                f"the gate was made for d_hidden = {gate.d_hidden}, vocab_size = {gate.vocab_size}; the model has "
                f"{has[0]}, {has[1]}"
            )
        self._items = self._window_accepted = 0

    def _refuse_what_is_not_plain(self: Any) -> None:
        args, kind = self.args, self.accelerator.distributed_type
        if kind not in _PLAIN or args.n_gpu > 1:
            found = kind.value if kind not in _PLAIN else f"one process with {args.n_gpu} GPUs"
            raise RuntimeError(f"a gated training is one process per GPU, plain or DDP; this is {found}")
        for name in ("activation_offloading", "auto_find_batch_size"):
            if getattr(args, name, False):
                raise ValueError(f"{name} does not go with a gate, which drops forward passes; leave it out")

    def create_accelerator_and_postprocess(self: Any) -> None:
        """The accelerator's backward pass is asked for by the trainer's own step; it waits for the gate."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        backward = self.accelerator.backward

        def if_accepted(loss: Tensor, **how: Any) -> None:
            if self._accepts(loss):
                backward(loss, **how)
                self.gate.accepted()
                self._window_accepted += 1
                self._items += self._micro
            self.gate.stepped()

        self.accelerator.backward = if_accepted

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        """Over `max_optimizer_steps`, if these are set."""
        self.optimizer.__class__ = _WindowOptimizer  # before the schedule, which takes hold of the optimizer's `step`
        return super().create_scheduler(self.max_optimizer_steps or num_training_steps, optimizer)  # type: ignore[misc]

    def training_step(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The trainer's own, but for the gate before its backward pass; and what ends a window."""
        if "labels" not in inputs:
            raise ValueError(f"a gate wants labels; the batch has {', '.join(inputs)}")
        self._labels = inputs["labels"]
        # Of the window's loss, this micro-batch's part is micro / window, by tokens or by micro-batches.
        self._micro, self._window = 1, self.current_gradient_accumulation_steps
        if num_items_in_batch is not None and getattr(self, "loss_is_scaled_for_ga", None) is not False:
            self._micro = int(self._get_num_items_in_batch([inputs], self.args.device))
            self._window = int(num_items_in_batch)
        with self.accelerator.no_sync(model), self._head.watch():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.accelerator.gradient_state.sync_gradients:
            self._end_window()
        return loss

    def _accepts(self: Any, loss: Tensor) -> bool:
        # Of a micro-batch without a label the loss is 0 / 0; of ranks, those count that have one.
        labelled = self._micro > 0
        own = (
            loss.detach().float() * (self._window / self._micro)
            if labelled
            else loss.new_zeros((), dtype=torch.float32)
        )
        total, share = self._over_ranks(torch.stack([own, torch.full_like(own, labelled)])).tolist()
        mean = total / share if share else math.nan
        if share and not math.isfinite(mean):
            raise ValueError(
                f"the training diverged: the loss is {mean} after step {self.state.global_step}; lower learning_rate, "
                f"which was {self.args.learning_rate:g}"
            )
        hidden, logits = self._head.seen(whole=getattr(self.gate, "compat", False))
        accepted = self.gate.decide(mean, hidden, logits, self._labels.to(hidden.device), self._over_ranks)
        if self.args.world_size > 1:
            first = torch.tensor([accepted], dtype=torch.int32, device=self.args.device)
            dist.broadcast(first, 0)
            accepted = bool(first.item())
        self.history.accepts.append(accepted)
        self.history.losses.append(mean if share else None)
        if (novelty := self.gate.metrics().get("novelty")) is not None:
            self.history.novelties.append(novelty)
        return bool(accepted)

    def _over_ranks(self: Any, x: Tensor) -> Tensor:
        """The mean."""
        if self.args.world_size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        total /= self.args.world_size
        return total

    def _end_window(self: Any) -> None:
        items, accepted, whole = self._items, self._window_accepted, self._window
        self._items = self._window_accepted = 0
        self.optimizer.resting = not accepted
        if not accepted:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is not None and 0 < items < whole:
                p.grad.mul_(whole / items)
        if self.args.world_size > 1:
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            sums = [dist.all_reduce(p.grad, async_op=True) for p in parameters]
            for pending in sums:
                pending.wait()
            for p in parameters:
                p.grad.div_(self.args.world_size)
        self.history.optimizer_steps += 1
        if self.history.optimizer_steps == self.max_optimizer_steps:
            self.control.should_training_stop = self.control.should_log = True
            self.control.should_save = self.args.save_strategy == "steps"

    def _clip_grad_norm(self: Any, model: Any) -> Any:
        return None if self.optimizer.resting else super()._clip_grad_norm(model)  # type: ignore[misc]

    def _get_grad_norm(self: Any, model: Any, grad_norm: Any = None) -> Any:
        return None if self.optimizer.resting else super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the gate's entries beside the loss."""
        if "loss" in logs and self.history.accepts:
            logs.update(self.history.logs() | {f"gate/{name}": x for name, x in self.gate.metrics().items()})
            if not self.history.told:
                self.history.told = True
                logs.update({f"gate/{name}": x for name, x in _made(self.gate).items()})
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        """With the gate's state, which is there before the file that makes a checkpoint whole."""
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            torch.save({"gate": self.gate.state_dict(), "history": vars(self.history)}, Path(output_dir) / GATE_STATE)
            self.history.write(Path(self.args.output_dir) / GATE_METRICS)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self.take_up(Path(checkpoint))

    def take_up(self: Any, checkpoint: Path) -> None:
        """Set the gate to where it was at a checkpoint; `train` does, so that calling this before is a check only.

        Raises:
            FileNotFoundError: it is of a training without a gate.
            ValueError: its gate was made with other sizes or another seed, or its training was at its end.
        """
        file = checkpoint / GATE_STATE
        if not file.is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no {GATE_STATE}: it is of a training without a gate, or was saved by save_only_model"
            )
        state = torch.load(file, weights_only=True)
        try:
            self.gate.load_state_dict(state["gate"])
        except ValueError as error:
            raise ValueError(f"{checkpoint} is of another gate: {error}; give the same") from error
        vars(self.history).update(state["history"])
        if self.max_optimizer_steps is not None and self.history.optimizer_steps >= self.max_optimizer_steps:
            raise ValueError(
                f"{checkpoint} has {self.history.optimizer_steps} of max_optimizer_steps = {self.max_optimizer_steps}: "
                "it is the end already; take it as it is, or raise max_optimizer_steps"
            )

    def _finalize_training(self: Any, *args: Any) -> Any:
        if self.args.should_save:
            self.history.write(Path(self.args.output_dir) / GATE_METRICS)
        return super()._finalize_training(*args)  # type: ignore[misc]


def _made(gate: Gate) -> dict[str, float]:
    """What a gate was made with, told once."""
    if not isinstance(gate, HeadGradientGate):
        return {"target_novelty": gate.target, "burn_in": gate.burn_in}
    return {
        "d_hidden": gate.d_hidden,
        "m": gate.sketch.m,
        "k": gate.sketch.k,
        "target_novelty": gate.target,
        "novelty_scaler": gate.scaler,
        "novelty_ema_rate": gate.controller.rate,
        "burn_in": gate.burn_in,
    }


@cache
def gated(trainer: type) -> Any:
    """A trainer with a gate, made from transformers' Trainer or a class made from it, such as TRL's SFTTrainer.

    It leaves gate_metrics.json in `output_dir`, and the gate's state in every checkpoint.

    Args:
        trainer: the class. What is returned takes its arguments, `gate`, and `max_optimizer_steps`.
    """
    return type(f"Gated{trainer.__name__}", (_Gated, trainer), {"__doc__": _Gated.__doc__})


def __getattr__(name: str) -> Any:
    """`GatedTrainer` and `GatedSFTTrainer`, for which transformers or TRL is imported."""
    if name == "GatedTrainer":
        from transformers import Trainer

        return gated(Trainer)
    if name == "GatedSFTTrainer":
        from trl import SFTTrainer

        return gated(SFTTrainer)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A transformers causal language model as calibration takes it: a trunk that ends in hidden states, and a head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_fast.calibration.packed.attention import NAME, Unpackable, keeping_apart, packed_attention
from spectral_fast.calibration.packed.packing import Pack
from spectral_fast.calibration.packed.products import WideProducts

LOGITS_AT_ONCE = 2**24  # elements: 64 MB in float32
GRAPH_BYTES = 2**32  # of what a forward pass leaves for the backward pass


class Decoder:
    """The two halves of a model.

    Args:
        model: a transformers causal language model, or a PEFT model of one.

    Raises:
        ValueError: if the model has no trunk of its own (`base_model_prefix`) that ends in hidden states.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = [getattr(self.model, "base_model_prefix", ""), "model", "transformer"]
        self.prefix = next((x for x in names if x and isinstance(getattr(self.model, x, None), nn.Module)), "")
        self.trunk: Any = getattr(self.model, self.prefix) if self.prefix else None
        if self.trunk is None or self.trunk is self.model:
            raise ValueError(f"{type(self.model).__name__} is not a causal language model as transformers builds them")

    @property
    def layers(self) -> tuple[str, nn.ModuleList]:
        """The decoder layers, and their name in the trunk.

        Raises:
            ValueError: if not exactly one list of modules in the trunk is as long as the model is deep.
        """
        depth = self.model.config.get_text_config().num_hidden_layers
        found = [
            (name, module)
            for name, module in self.trunk.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth and not re.search(r"\d", name)
        ]
        if len(found) != 1:
            raise ValueError(f"{type(self.trunk).__name__} does not have its {depth} layers in one list")
        return found[0]

    def pack_tokens(self, layers_at_once: int | None = None) -> int:
        """How many tokens to pack together, from 512 to 4096, so that their graph takes about 4 GiB.

        Fewer, and weights are read too often; more make nothing faster. A layer keeps some 12 numbers per hidden one
        and 3 per intermediate one (measured on Llama and Phi-3 in bfloat16).

        Args:
            layers_at_once: how many layers have a graph at the same time; by default all.
        """
        config = self.model.config.get_text_config()
        hidden = config.hidden_size
        sizes = (getattr(config, name, None) for name in ("moe_intermediate_size", "intermediate_size"))
        wide = next((size for size in sizes if size), 4 * hidden)
        experts = getattr(config, "num_experts_per_tok", None) or 1
        kept = (layers_at_once or config.num_hidden_layers) * (12 * hidden + 3 * wide * experts)
        return int(min(max(GRAPH_BYTES // (kept * self.model.dtype.itemsize), 512), 4096))

    def hidden(self, pack: Pack) -> Tensor:
        """The trunk's last hidden states, (rows, length, hidden).

        Raises:
            Unpackable: if some layer does not keep the samples of a packed row apart.
        """
        inputs = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "use_cache": False}
        packed = self.model.config._attn_implementation == NAME
        apart = keeping_apart(pack.starts.tolist()) if packed else nullcontext({"attention_mask": pack.attention_mask})
        with apart as how:
            hidden: Tensor = self.trunk(**inputs, **how, return_dict=True).last_hidden_state
        return hidden

    def loss_gradient(
        self, hidden: Tensor, pack: Pack, scale: float = 1.0, of_head: Iterable[Any] = ()
    ) -> tuple[float, Tensor]:
        """Σ weights · cross entropy, and scale times its gradient with respect to the hidden states.

        Logits are formed at labelled positions only, a bounded number at once. Modules of the head that have
        gradients to find get them on the way.

        Args:
            hidden: (rows, length, hidden), detached.
            pack: where the labels are.
            scale: of the gradient, for float16.
            of_head: spectral layers of the head, which are told the bounds of the samples among the tokens of a chunk.

        Raises:
            ValueError: the loss is NaN or infinite.
        """
        flat = hidden.detach().flatten(0, 1)
        gradient = torch.zeros_like(flat)
        loss = torch.zeros((), dtype=torch.float64, device=flat.device)
        step = max(1, LOGITS_AT_ONCE // int(self.model.config.get_text_config().vocab_size))
        with torch.enable_grad(), self._trunk_gives() as head:
            for a in range(0, len(pack.targets), step):
                where, targets = pack.positions[a : a + step].to(flat.device), pack.targets[a : a + step]
                for layer in of_head:
                    layer.starts = pack.label_starts.clamp(a, a + len(where)) - a
                chosen = flat[where].requires_grad_()
                logits = head(chosen[None])[0]
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                losses = F.cross_entropy(wide, targets.to(logits.device), reduction="none")
                weighted = (losses * pack.weights[a : a + step].to(losses)).sum()
                (weighted * scale).backward()  # type: ignore[no-untyped-call]
                assert chosen.grad is not None
                gradient[where] = chosen.grad
                loss += weighted.detach().to(loss)
        if not loss.isfinite():
            raise ValueError(
                f"the calibration loss is {loss.item()}: the base model or the adapter has NaN or infinite weights, or "
                f"overflows in {flat.dtype}, which a wider --dtype would not"
            )
        return loss.item(), gradient.view(hidden.shape)

    @contextmanager
    def _trunk_gives(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The model's own forward after its trunk: a function from hidden states to logits."""
        given = _Given()
        setattr(self.model, self.prefix, given)

        def head(hidden: Tensor) -> Tensor:
            given.hidden = hidden
            logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False, return_dict=True).logits
            return logits

        try:
            yield head
        finally:
            setattr(self.model, self.prefix, self.trunk)


class _Given(nn.Module):
    """Stands in for the trunk, and ends in hidden states that are there already."""

    hidden: Tensor

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(self.hidden)

    def __getattr__(self, name: str) -> Any:
        if name == "decoder":  # some run this part of their trunk only, which ends in the same
            return self
        raise ValueError(f"this model's head asks its trunk for {name}, and cannot be calibrated")


class _Output:
    """What a trunk returns: hidden states, and None for all else that some models look for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def ready_for(decoder: Decoder, layout: str) -> Iterator[None]:
    """Within the context the model takes packs of a layout, in its own dtype, and as fast as it can.

    Autocast is off, nothing is differentiated below the lowest layer that is to be, and frozen products are formed in
    the precision in which the processor is fast.

    Raises:
        Unpackable: see `packed_attention`.
    """
    packed: AbstractContextManager[None] = nullcontext()
    if layout == "packed":
        try:
            packed = packed_attention(decoder.model, decoder.layers[1])
        except ValueError as error:
            raise Unpackable(str(error)) from error
    # Where inputs were made to require gradients, as gradient checkpointing wants it, all layers would have graphs.
    embeddings = decoder.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, hidden: hidden.detach())
    device = next(decoder.model.parameters()).device.type
    try:
        with packed, torch.autocast(device if device != "meta" else "cpu", enabled=False), WideProducts():
            yield
    finally:
        hook.remove()

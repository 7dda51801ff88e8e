"""The gate watched: does acceptance settle, is its novelty that of the gradient? ``python -m benchmarks.novelty``.

A LoRA adapter of the embedded model is trained on two-step problems by a plain loop, a gate before each step. Beside it
the gradient of the adapter itself is taken for every micro-batch, rejected ones too, sketched, and compared with the
directions of accepted ones in the same way: the novelty that the gate's stands for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiment import parser_of, write_table
from benchmarks.timing import ROOT
from spectral_fast import ModelOptions, embedded
from spectral_fast.calibration.data import IGNORED, encode_question_answer
from spectral_fast.calibration.model import load_model, load_tokenizer
from spectral_fast.embedded.problems import stream
from spectral_fast.training import HeadGradientGate
from spectral_fast.training.gate import FrequentDirections

RESULTS = ROOT / "benchmarks" / "results" / "gate-novelty.csv"
BATCH, STEPS, BURN_IN, BLOCK, SKETCH = 2, 1500, 100, 100, 2048
RATE = 1e-3


@dataclass(frozen=True)
class Look:
    """One micro-batch: the gate's novelty, that of the adapter's gradient, the loss, the threshold, the decision."""

    novelty: float
    gradient: float
    loss: float
    tau: float
    accepted: bool


def batches(steps: int) -> Iterator[dict[str, Tensor]]:
    """Padded micro-batches, as a trainer makes them."""
    tokenizer = load_tokenizer(str(embedded.base_model_dir()), ModelOptions())
    rows = stream(2, seed=1000, held_out=False)
    for _ in range(steps):
        found = [encode_question_answer(tokenizer, row["question"], row["answer"]) for row in islice(rows, BATCH)]
        longest = max(len(x.ids) for x in found)
        pads = [longest - len(x.ids) for x in found]
        yield {
            "input_ids": torch.tensor([[*x.ids, *[0] * n] for x, n in zip(found, pads, strict=True)]),
            "labels": torch.tensor([[*x.labels, *[IGNORED] * n] for x, n in zip(found, pads, strict=True)]),
            "attention_mask": torch.tensor([[1] * len(x.ids) + [0] * n for x, n in zip(found, pads, strict=True)]),
        }


def looks(steps: int, burn_in: int) -> Iterator[Look]:
    """The training."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base: Any = load_model(str(embedded.base_model_dir()), ModelOptions())
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    head = model.get_output_embeddings()
    gate = HeadGradientGate(head.in_features, head.out_features, burn_in=burn_in)
    # A CountSketch of the gradient: unbiased, as the gate's.
    size, generator = sum(p.numel() for p in parameters), torch.Generator().manual_seed(1)
    buckets = torch.randint(SKETCH, (size,), generator=generator)
    signs = 2.0 * torch.randint(2, (size,), generator=generator) - 1
    directions = FrequentDirections(SKETCH, gate.sketch.k)
    entered: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    for batch in batches(steps):
        out = model(**batch)
        loss = float(out.loss.detach())
        accepted = gate.decide(loss, entered.pop(), out.logits, batch["labels"])
        optimizer.zero_grad()
        out.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        z = torch.nn.functional.normalize(torch.zeros(SKETCH).index_add_(0, buckets, gradient * signs), dim=0)
        true = 1 - directions.captured(z)
        if accepted:
            optimizer.step()
            gate.accepted()
            directions.update(z)
        gate.stepped()
        yield Look(gate.last_novelty, true, loss, gate.tau, accepted)


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, of ranks."""
    ranks = torch.stack([torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


def table(found: Sequence[Look]) -> Iterator[dict[str, Any]]:
    """A row per 100 micro-batches; correlations are within them, so that no common trend is in them."""
    for first in range(0, len(found) - BLOCK + 1, BLOCK):
        block = found[first : first + BLOCK]
        novelty, gradient, loss = ([getattr(x, name) for x in block] for name in ("novelty", "gradient", "loss"))
        yield {
            "until": first + BLOCK,
            "accepted": f"{fmean(x.accepted for x in block):.2f}",
            "tau": f"{block[-1].tau:.3f}",
            "novelty": f"{fmean(novelty):.3f}",
            "novelty_of_gradient": f"{fmean(gradient):.3f}",
            "loss": f"{fmean(loss):.4f}",
            "rank_correlation": f"{correlation(novelty, gradient):+.3f}",
            "with_loss": f"{correlation(novelty, loss):+.3f}",
            "of_gradient_with_loss": f"{correlation(gradient, loss):+.3f}",
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, watch; print the table and write it."""
    parser = parser_of("benchmarks.novelty", __doc__, RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"micro-batches of {BATCH} (default: {STEPS})")
    parser.add_argument("--burn_in", type=int, default=BURN_IN, help=f"(default: {BURN_IN})")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = list(looks(args.steps, args.burn_in))
    made = {"batch": BATCH, "burn_in": args.burn_in}
    rows = write_table(table(found), made, args.out, "benchmarks.novelty", argv)
    settled = found[args.burn_in + 4 * BLOCK :]
    if settled:
        print(f"accepted of the {len(settled)} last: {fmean(x.accepted for x in settled):.3f}")
        within = [float(row["rank_correlation"]) for row in rows if row["until"] > args.burn_in + BLOCK]
        print(f"rank correlation of the two novelties within blocks, mean: {fmean(within):+.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Small trainings with a gate, that two test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_llama, with_lora
from torch import Tensor
from transformers import Trainer, TrainingArguments

from spectral_fast.training import GatedTrainer
from spectral_fast.training.gate import Gate

HIDDEN, VOCABULARY = 48, 97
SIZES = {"d_hidden": HIDDEN, "vocab_size": VOCABULARY, "m": 64, "k": 8}


class Scripted(Gate):
    """Says what it was told to say, over and over, and keeps what it was shown."""

    def __init__(self, says: str) -> None:
        super().__init__(1.0, 0, 0)
        self.says = says
        self.shown: list[Any] = []

    def decide(self, loss: float, hidden: Tensor, logits: Tensor, labels: Tensor, mean: Any = None) -> bool:  # noqa: ARG002
        self.shown.append((loss, hidden, logits, labels))
        return self.says[self.step_count % len(self.says)] == "y"


def rows(count: int = 16, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token ids of two lengths, some of which have no label: so that no two micro-batches have equally many."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(1, VOCABULARY, (6 + 3 * (i % 2),), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (1 + i % 4) + ids[1 + i % 4 :]})
    return made


def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids > 0).long()}


def arguments(out: Path, **more: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(out), **{**defaults, **more})


def trainer(
    out: Path, gate: Gate | None, data: Any = None, model: Any = None, limit: int | None = None, **more: Any
) -> Any:
    how = {"args": arguments(out, **more), "train_dataset": data or rows(), "data_collator": collate}
    model = model or with_lora(tiny_llama())
    return Trainer(model, **how) if gate is None else GatedTrainer(model, gate=gate, max_optimizer_steps=limit, **how)


def weights(trained: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 0) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=rtol, atol=rtol * 0.1) for name in a)


def logged(trained: Any, key: str) -> list[Any]:
    return [entry[key] for entry in trained.state.log_history if key in entry]

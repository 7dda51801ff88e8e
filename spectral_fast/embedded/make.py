"""Make the embedded model, adapter and problems: ``python -m spectral_fast.embedded.make --out_dir DIR``.

The base model learns one-step problems, the LoRA adapter two-step ones. Training of the adapter stops as soon
as it answers 70 % of 256 held-out problems: an edit of its spectrum can then move the accuracy either way.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from spectral_fast.embedded.problems import Problem, stream
from spectral_fast.evaluation.gsm8k import build_prompts, score

BASE_STEPS, BASE_BATCH, CALCULATION_BATCH = 700, 32, 256
ADAPTER_STEPS, ADAPTER_BATCH = 1000, 32
TARGET_ACCURACY = 0.70
MAX_NEW_TOKENS = 110
_CALCULATION = re.compile(r"(\S+ = <<[^=]+=)(\d+>>\d+)")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, newline and tab; no BOS; <pad> is not <eos>."""
    characters = [*map(chr, range(32, 127)), "\n", "\t"]
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()  # without a decoder the characters are joined by spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3.2 million parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=688,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def worked(problems: Iterable[Problem]) -> Iterator[tuple[str, str]]:
    """Prompts and answers."""
    for problem in problems:
        yield build_prompts([problem], [])[0], " " + problem["answer"]


def calculations(problems: Iterable[Problem]) -> Iterator[tuple[str, str]]:
    """Calculations without their stories, ``3+4 = <<3+4=`` and ``7>>7``: a sixth of the tokens."""
    for problem in problems:
        yield from _CALCULATION.findall(problem["answer"])


def batches(
    examples: Iterator[tuple[str, str]], tokenizer: Any, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of ids and of labels, -100 but at answers; padding is on the right."""
    while True:
        rows = [
            (tokenizer.encode(question), [*tokenizer.encode(answer), tokenizer.eos_token_id])
            for question, answer in islice(examples, size)
        ]
        ids = torch.full((size, max(len(q) + len(a) for q, a in rows)), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (question, answer) in enumerate(rows):
            length = len(question) + len(answer)
            ids[row, :length] = torch.tensor(question + answer)
            labels[row, len(question) : length] = torch.tensor(answer)
        yield ids, labels


def train(
    model: Any,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    finished: Callable[[int, float], bool],
) -> None:
    """Optimise with a linear warm-up and decay until ``finished(step, loss)`` or ``steps``."""
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, 1.02 - step / steps))
        for optimizer in optimizers
    ]
    for step, (ids, labels) in zip(range(1, steps + 1), data, strict=False):
        model.train()
        # Padding follows the text and has no label: the causal mask alone keeps it out of the loss.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if finished(step, loss.item()):
            return


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, problems: list[Problem]) -> float:
    """Share of problems whose greedily generated answer ends with the right number."""
    model.eval()
    right = 0
    for first in range(0, len(problems), 128):
        batch = problems[first : first + 128]
        inputs = tokenizer(build_prompts(batch, []), padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(row["correct"] for row in score(batch, texts, "strict_last"))
    return right / len(problems)


def make(out_dir: Path, seed: int) -> None:
    """Train the base model and the adapter, and write them with their problems and the log to ``out_dir``."""
    torch.manual_seed(seed)
    out_dir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    log_file = (out_dir / "training_log.jsonl").open("w")

    def log(**row: object) -> None:
        line = json.dumps(row | {"seconds": round(time.perf_counter() - began)})
        print(line, file=log_file, flush=True)
        print(line, flush=True)

    one_step = list(islice(stream(1, seed=seed + 1, held_out=True), 512))
    two_step = list(islice(stream(2, seed=seed + 2, held_out=True), 256 + 512))
    checked, held_out = two_step[:256], two_step[256:]  # only the first decide when to stop
    training = stream(2, seed=seed + 3, held_out=False)
    calibration = list(islice(training, 256))

    base_dir, adapter_dir = out_dir / "base_model", out_dir / "adapter"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(base_dir)
    # transformers 5 writes its own name of the class; 4 and 5 both know this one.
    config = base_dir / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    model: Any = make_model(tokenizer)
    log(part="base", parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads())

    def base_finished(step: int, loss: float) -> bool:
        if step % 25 == 0:
            measured = {"one_step_accuracy": accuracy(model, tokenizer, one_step[:64])} if step % 100 == 0 else {}
            log(part="base", step=step, loss=round(loss, 4), **measured)
        return False

    one_step_problems = stream(1, seed=seed + 4, held_out=False)
    alternating = (
        batches(calculations(one_step_problems), tokenizer, CALCULATION_BATCH),
        batches(worked(one_step_problems), tokenizer, BASE_BATCH),
    )
    data = chain.from_iterable(zip(*alternating, strict=True))
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight, *(norm for norm in model.parameters() if norm.ndim == 1)]
    # From a loss of 4.6, ten steps of Muon led to 2.8, and eight of AdamW with lr 1e-3 to 3.5.
    muon = torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0)
    train(model, data, [muon, adamw], BASE_STEPS, base_finished)
    model.to(torch.bfloat16).save_pretrained(base_dir)

    base: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    log(
        part="base, as shipped",
        one_step_accuracy=accuracy(base, tokenizer, one_step),
        two_step_accuracy=accuracy(base, tokenizer, held_out),
    )

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=32,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    )
    model = get_peft_model(base, lora)
    log(part="adapter", parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))

    def adapter_finished(step: int, loss: float) -> bool:
        if step % 20:
            return False
        measured = accuracy(model, tokenizer, checked)
        log(part="adapter", step=step, loss=round(loss, 4), two_step_accuracy=measured)
        return measured >= TARGET_ACCURACY

    two_step_data = batches(worked(chain(calibration, training)), tokenizer, ADAPTER_BATCH)
    adamw = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3, weight_decay=0.0)
    train(model, two_step_data, [adamw], ADAPTER_STEPS, adapter_finished)
    model.peft_config["default"].base_model_name_or_path = "spectral_fast/embedded/assets/base_model"
    model.save_pretrained(adapter_dir, save_embedding_layers=False)
    weights = adapter_dir / "adapter_model.safetensors"
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})
    (adapter_dir / "README.md").unlink()  # PEFT's empty model card

    for name, problems in (("calibration", calibration), ("heldout", held_out)):
        (out_dir / f"{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))

    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_dir)
    log(part="adapter, as shipped", two_step_accuracy=accuracy(model, tokenizer, held_out))
    log_file.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the embedded model, adapter and problems.")
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out_dir, arguments.seed)

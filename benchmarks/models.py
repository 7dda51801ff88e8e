"""Llamas with random weights and adapters, in memory and as folders: ``python -m benchmarks.models TASK FOLDER``.

A folder holds model/ (shards, config.json, tokenizer), adapter/ and samples.jsonl, and takes as much memory to write as
its largest tensor. Weights are normal with a deviation of 0.02, as Llama's are before training, and norms are one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, scaling
from benchmarks.cases import SURGERY, Calibration, Task
from benchmarks.machine import software
from benchmarks.peers_calibration import ADAPTER
from benchmarks.samples import examples, problems, tokenizer
from spectral_fast.tensorfile import Layout, TensorInfo, writing_safetensors

SHARD = 5 * 10**9  # bytes, at most: transformers' own limit for a long time
POSITIONS = 4096


def config(case: Calibration) -> Any:
    """The model's configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.mlp,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        max_position_embeddings=POSITIONS,
        dtype=case.dtype,
    )


def peft_model(case: Calibration) -> Any:
    """A random model in memory, in evaluation mode, with an adapter as PEFT loads one."""
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    # PEFT keeps the factors in float32 beside a bfloat16 model.
    model = get_peft_model(LlamaForCausalLM(config(case)).to(getattr(torch, case.dtype)), _lora(case))
    for name, parameter in model.named_parameters():
        if f"lora_B.{ADAPTER}" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def write(case: Calibration, folder: Path) -> None:
    """Write a model, its tokenizer, an adapter and samples into a new folder."""
    model, adapter = folder / "model", folder / "adapter"
    model.mkdir(parents=True)
    adapter.mkdir()
    dtype: torch.dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)

    shards: list[dict[str, TensorInfo]] = [{}]
    for name, shape in _shapes(case):
        info = TensorInfo(dtype, shape)
        if sum(x.nbytes for x in shards[-1].values()) + info.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = info
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        _write(model / file, tensors, lambda shape: values(shape) if len(shape) > 1 else torch.ones(shape, dtype=dtype))
    total = sum(x.nbytes for tensors in shards for x in tensors.values())
    places = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config(case).save_pretrained(model)
    tokenizer().save_pretrained(model)

    factors = {
        f"base_model.model.model.layers.{layer}.{name}.lora_{side}.weight": TensorInfo(torch.float32, shape)
        for layer in range(case.layers)
        for name, m, n in (("self_attn.o_proj", case.hidden, case.hidden), ("mlp.down_proj", case.hidden, case.mlp))
        for side, shape in (("A", (case.rank, n)), ("B", (m, case.rank)))
    }
    _write(adapter / "adapter_model.safetensors", factors, lambda shape: values(shape).float())
    _lora(case).save_pretrained(adapter)
    rows = "".join(json.dumps(row) + "\n" for row in problems(case.samples))
    (folder / "samples.jsonl").write_text(rows, encoding="utf-8")


def _write(file: Path, tensors: dict[str, TensorInfo], values: Callable[[tuple[int, ...]], Tensor]) -> None:
    with writing_safetensors(file, Layout.of(tensors, {"format": "pt"})) as put:
        for name, info in tensors.items():
            put(name, values(info.shape))


def _lora(case: Calibration) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=case.rank, lora_alpha=case.rank, target_modules=list(SURGERY))


def _shapes(case: Calibration) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (case.vocabulary, case.hidden)
    for layer in range(case.layers):
        prefix = f"model.layers.{layer}"
        for name, shape in case.model.shapes.items():
            yield f"{prefix}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (case.hidden,)
    yield "model.norm.weight", (case.hidden,)
    yield "lm_head.weight", (case.vocabulary, case.hidden)


def main() -> None:
    """Write the model of a task; print what a table of it needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Task.loads)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    assert isinstance(args.task.case, Calibration)
    write(args.task.case, args.folder)
    print(json.dumps(bounds(args.task.case, streamed=True)))


def bounds(case: Calibration, *, streamed: bool = False) -> dict[str, Any]:
    """What a table tells beside the times: bytes and operations that it takes, and how fast this machine does those.

    In memory every weight is read twice; a layer that is streamed is computed again, too.
    """
    dtype: torch.dtype = getattr(torch, case.dtype)
    shape, work = scaling.Shape.of(case), scaling.Work.of(examples(case.samples), case.rank)
    nbytes = scaling.weights_read(shape, dtype.itemsize) if streamed else 2 * shape.parameters * dtype.itemsize
    copied = torch.ones(2**26, dtype=dtype)
    return {
        "software": software(),
        "nbytes": nbytes,
        "flops": scaling.flops(shape, work, recomputed=streamed),
        "bandwidth": floors.bandwidth([(torch.empty_like(copied), copied)]),
        "peak": floors.peak(dtype, torch.float32),
        "tokens": work.tokens,
    }


if __name__ == "__main__":
    main()

"""One tiny random model of every family that layer-major calibration is tested on, and its checkpoint in shards."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from spectral_fast.calibration.data import IGNORED
from spectral_fast.calibration.spectral_form import lora_layers

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**BASE, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**BASE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", BASE),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 8}),
    "mistral": ("Mistral", {**BASE, "sliding_window": 5}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {**GEMMA, "sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}),
    "gemma4": (
        "Gemma4Text",
        {
            **GEMMA,
            "global_head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
        },
    ),
    "phi3": ("Phi3", {**BASE, "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoX", {**BASE, "rotary_pct": 0.5}),
    "mixtral": ("Mixtral", {**BASE, **EXPERTS, "num_local_experts": 3}),
    "qwen3_moe": ("Qwen3Moe", {**BASE, **EXPERTS, "head_dim": 8, "num_experts": 3, "moe_intermediate_size": 24}),
}
WITH_TUPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 4, "n_head": 4, "initializer_range": 0.2}),
    "gptj": ("GPTJ", {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
}


def family_model(family: str, **changes: Any) -> Any:
    """A random model of the family: four layers, hidden 32."""
    import transformers

    name, settings = {**FAMILIES, **WITH_TUPLES}[family]
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_in_shards(model: Any, path: Path) -> str:
    """Save the model as its family's checkpoints are, in many small shards; returns the folder's name."""
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return str(path)


TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "gptj": ["q_proj", "fc_out"],
}
ATTENTION = ["q_proj", "o_proj"]


def save_adapter(model: Any, family: str, path: Path, **config: Any) -> Any:
    """Give the model a random LoRA and save it; returns the PEFT model."""
    from tiny_models import with_lora

    targets = TARGETS.get(family, ATTENTION if "moe" in family or family == "mixtral" else [*ATTENTION, "down_proj"])
    peft_model = with_lora(model, **{"target_modules": targets, "r": 4, **config}).eval()
    peft_model.save_pretrained(path)
    return peft_model


def ragged_samples(count: int = 7, seed: int = 3) -> list[Any]:
    """Samples of 4 to 29 tokens, each with labels from some token on."""
    from spectral_fast.calibration.data import Example

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(4, 30, (), generator=generator))
        prompt = int(torch.randint(1, length, (), generator=generator))
        ids = torch.randint(0, 97, (length,), generator=generator).tolist()
        samples.append(Example.continuation(ids, prompt))
    return samples


def largest_difference(got: Any, wanted: dict[str, torch.Tensor]) -> float:
    """Of g per sample, relative to the norm of a module's: the largest over modules."""
    assert set(got.modules) == set(wanted)
    return max(
        float((got.modules[name].samples.double() - g.double()).norm() / g.double().norm())
        for name, g in wanted.items()
    )


ARGUMENTS = {"batch_size": 3, "pack_tokens": 40}
SAMPLES = ragged_samples()


def save(tmp_path: Path, family: str = "llama", changes: dict[str, Any] | None = None, **lora: Any) -> Any:
    """A base model and an adapter of it on disk; gives the PEFT model of both."""
    model = family_model(family, **(changes or {}))
    save_in_shards(model, tmp_path / "base")
    return save_adapter(model, family, tmp_path / "adapter", **lora)


def stream(tmp_path: Path, budget: int = 0, dtype: str = "fp32", **arguments: Any) -> tuple[Any, Any]:
    """The sensitivity of `SAMPLES` by the layer-major engine, and the weights that it read."""
    from spectral_fast.adapter import Adapter
    from spectral_fast.calibration.calibrate import calibrate
    from spectral_fast.calibration.model import ModelOptions
    from spectral_fast.calibration.streaming.skeleton import load_skeleton
    from spectral_fast.calibration.streaming.stream import streamed

    model, weights = load_skeleton(
        str(tmp_path / "base"), ModelOptions(dtype=dtype, device="cpu"), Adapter.open(tmp_path / "adapter")
    )
    folder = tmp_path / f"work {budget}"
    folder.mkdir(exist_ok=True)
    engines = partial(streamed, weights=weights, folder=folder, budget=budget)
    return calibrate(model, "default", SAMPLES, engines=engines, **{**ARGUMENTS, **arguments}), weights


def by_autograd(model: Any, batch_size: int) -> dict[str, torch.Tensor]:
    """g per sample from full logits, with every LoRA branch as the dense U diag(s) Vᵀ, one sample at a time."""
    model = copy.deepcopy(model).double()
    model.get_base_model().config._experts_implementation = "eager"  # the grouped product has no float64
    sigmas: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model, "default").items():
        b, a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        r = b.shape[1]
        sigmas[name] = s[:r].clone().requires_grad_()

        def forward(x: Any, layer: Any = layer, u: Any = u[:, :r], vh: Any = vh[:r], name: str = name) -> Any:
            return layer.base_layer(x) + layer.scaling["default"] * F.linear(x, u @ torch.diag(sigmas[name]) @ vh)

        layer.forward = forward
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in sigmas}
    for first in range(0, len(SAMPLES), batch_size):
        batch = SAMPLES[first : first + batch_size]
        labels = sum(sample.n_labels for sample in batch)
        for sample in batch:
            logits = model(input_ids=torch.tensor([sample.ids])).logits[0, :-1]
            targets = torch.tensor(sample.labels[1:])
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / labels
            grads = torch.autograd.grad(loss, list(sigmas.values()))
            for name, grad in zip(sigmas, grads, strict=True):
                rows[name].append(grad)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))

"""Damaged base models and adapters are refused the same way in memory and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stream_models import family_model, save_adapter, save_in_shards

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.model import ModelOptions, load_model
from spectral_fast.calibration.streaming.skeleton import load_skeleton

INDEX = "model.safetensors.index.json"
PROJECTION = "model.layers.2.self_attn.o_proj.weight"
WAYS: dict[str, Callable[[Path, Adapter], Any]] = {
    "memory": lambda base, adapter: load_model(str(base), ModelOptions(), adapter),
    "stream": lambda base, adapter: load_skeleton(str(base), ModelOptions(), adapter),
}
both = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_in_shards(family_model("qwen2"), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    save_adapter(family_model("qwen2"), "qwen2", tmp_path / "adapter")
    return Adapter.open(tmp_path / "adapter")


def shard_of(base: Path, name: str) -> Path:
    return base / json.loads((base / INDEX).read_text())["weight_map"][name]


def change(base: Path, name: str, by: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    file = shard_of(base, name)
    tensors = load_file(file)
    new = by(tensors.pop(name))
    save_file(tensors if new is None else tensors | {name: new}, file, {"format": "pt"})


@both
def test_a_whole_checkpoint_is_taken(way: str, base: Path, adapter: Adapter) -> None:
    WAYS[way](base, adapter)


@both
def test_weights_that_are_missing_are_not_made_up(way: str, base: Path, adapter: Adapter) -> None:
    change(base, PROJECTION, lambda _: None)
    with pytest.raises(ValueError, match=rf"base has no weights for {PROJECTION}.* of Qwen2ForCausalLM"):
        WAYS[way](base, adapter)


@both
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_in_a_form_that_nothing_explains_are_refused(
    way: str, dtype: torch.dtype, base: Path, adapter: Adapter
) -> None:
    change(base, PROJECTION, lambda x: x.to(dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"safetensors: {PROJECTION} is {name}.* no quantization_config"):
        WAYS[way](base, adapter)


@both
def test_a_shard_that_is_not_there_is_named(way: str, base: Path, adapter: Adapter) -> None:
    file = shard_of(base, PROJECTION)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{INDEX} names {file.name}, which is not there"):
        WAYS[way](base, adapter)


@both
@pytest.mark.parametrize("content", [b"{", b"{}", b'{"weight_map": 3}'])
def test_a_damaged_index_is_named(way: str, content: bytes, base: Path, adapter: Adapter) -> None:
    (base / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=f"{INDEX} is not an index of shards"):
        WAYS[way](base, adapter)


@both
@pytest.mark.parametrize("damage", ["cut", "empty", "pointer"])
def test_a_damaged_shard_is_named(way: str, damage: str, base: Path, adapter: Adapter) -> None:
    file = shard_of(base, PROJECTION)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    file.write_bytes({"cut": file.read_bytes()[:-100], "empty": b"", "pointer": pointer}[damage])
    with pytest.raises((ValueError, OSError), match=file.name):
        WAYS[way](base, adapter)


@both
def test_half_a_pair_of_factors_is_refused(way: str, base: Path, adapter: Adapter) -> None:
    file = adapter.path / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "lora_B" in name)
    del tensors[lost]
    save_file(tensors, file)
    name = lost.removesuffix(".lora_B.weight")
    with pytest.raises(ValueError, match=f"damaged: {name} has one factor only, lora_B is missing"):
        WAYS[way](base, Adapter.open(adapter.path))


def test_a_checkpoint_without_safetensors_cannot_be_streamed(tmp_path: Path, adapter: Adapter) -> None:
    model = family_model("qwen2")
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has neither.*run without --stream"):
        WAYS["stream"](tmp_path / "bin", adapter)

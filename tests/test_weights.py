"""Parts of a checkpoint, read one at a time: the same tensors as transformers' own loading, and gone after use."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stream_models import FAMILIES, family_model, save_in_shards

from spectral_fast.calibration.checkpoint import checkpoint_files
from spectral_fast.calibration.streaming.skeleton import empty_model
from spectral_fast.calibration.streaming.weights import EMBEDDINGS, HEAD, OTHER, Weights

CPU = torch.device("cpu")
LAYERS = {"gpt_neox": "gpt_neox.layers"}
PARTS = [EMBEDDINGS, 0, 1, 2, 3, OTHER, HEAD]


def streamed(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, Weights]:
    from transformers import AutoConfig

    model = empty_model(AutoConfig.from_pretrained(folder), dtype)
    return model, Weights(model, checkpoint_files(str(folder)), LAYERS.get(family, "model.layers"), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_has_the_values_that_transformers_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_in_shards(family_model(family), tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model, weights = streamed(tmp_path, family, dtype)
    with weights.prefetched(PARTS) as parts:
        assert list(parts) == PARTS
    assert dict(wanted.named_buffers()).keys() == dict(model.named_buffers()).keys()
    for name, value in [*wanted.state_dict().items(), *wanted.named_buffers()]:
        got = dict(model.named_buffers()).get(name, model.state_dict().get(name))
        assert got.dtype == value.dtype
        assert torch.equal(got, value), name


def test_only_the_part_that_is_asked_for_is_there(tmp_path: Path) -> None:
    save_in_shards(family_model("llama"), tmp_path)
    model, weights = streamed(tmp_path)
    with weights.prefetched([1]) as parts:
        next(parts)
        there = {name for name, value in model.state_dict().items() if not value.is_meta}
        assert there
        assert all(name.startswith("model.layers.1.") for name in there)
        weights.drop(1)
    assert all(value.is_meta for value in model.state_dict().values())


def test_bytes_read_are_those_of_the_parts(tmp_path: Path) -> None:
    model = family_model("llama", tie_word_embeddings=False)
    save_in_shards(model, tmp_path)
    size = sum(value.nbytes for name, value in model.state_dict().items() if "layers.2." in name)
    _, weights = streamed(tmp_path)
    with weights.prefetched([2, 2, HEAD]) as parts:
        list(parts)
    assert weights.bytes_read == 2 * size + model.lm_head.weight.nbytes


def mappings(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_a_dropped_part_is_unmapped(tmp_path: Path) -> None:
    save_in_shards(family_model("llama"), tmp_path)
    model, weights = streamed(tmp_path)
    with weights.prefetched([0, 1, 2]) as parts:
        next(parts)
        value = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        assert mappings(tmp_path)
        weights.drop(0)
        for part in parts:
            weights.drop(part)
    gc.collect()
    assert value() is None
    assert not mappings(tmp_path)


def test_at_most_two_parts_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_in_shards(family_model("llama"), tmp_path)
    _, weights = streamed(tmp_path)
    read, mapped, wanted = Weights._read, [], [0]

    def counting(self: Weights, part: Any, stream: None) -> dict[str, torch.Tensor]:
        values = read(self, part, stream)
        keys = [key for recipe in self._recipes[part] for _, key in recipe.sources]
        wanted.append(len({self._shards[key].path for key in keys}))
        mapped.append(mappings(tmp_path))
        return values

    monkeypatch.setattr(Weights, "_read", counting)
    with weights.prefetched([0, 1, 2, 3, 2, 1, 0]) as parts:
        for part in parts:
            weights.drop(part)
    assert all(count <= sum(pair) for count, pair in zip(mapped, itertools.pairwise(wanted), strict=True))


def test_a_part_that_cannot_be_read_is_an_error_at_its_turn_and_leaves_no_thread(tmp_path: Path) -> None:
    save_in_shards(family_model("llama"), tmp_path)
    _, weights = streamed(tmp_path)
    before = threading.active_count()
    shard = weights._shards["model.layers.2.mlp.up_proj.weight"].path
    with pytest.raises(OSError, match=shard.name), weights.prefetched([0, 1, 2]) as parts:  # noqa: PT012
        assert next(parts) == 0  # 1 may be read by now, but not 2
        shard.unlink()
        list(parts)
    assert threading.active_count() == before


def test_the_tied_head_is_the_embedding_whichever_of_the_two_is_in_the_checkpoint(tmp_path: Path) -> None:
    model = family_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    skeleton, weights = streamed(tmp_path)
    with weights.prefetched([EMBEDDINGS, HEAD]) as parts:
        list(parts)
    assert torch.equal(skeleton.model.embed_tokens.weight, model.lm_head.weight)
    assert torch.equal(skeleton.lm_head.weight, model.lm_head.weight)


def test_a_tensor_at_an_odd_offset_is_read_right(tmp_path: Path) -> None:
    model = family_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip() + b" " * (3 - len(raw[8 : 8 + length].rstrip()) % 4)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert (8 + len(text)) % 4
    skeleton, weights = streamed(tmp_path)
    with weights.prefetched([0]) as parts:
        list(parts)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(skeleton.state_dict()[name], model.state_dict()[name])


def test_a_checkpoint_without_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    family_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model\.layers\.3\.mlp\.up_proj\.weight"):
        streamed(tmp_path)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    family_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ValueError, match=r"gate_proj\.weight is \(48, 32\) in the model .* but \(40, 32\) in"):
        streamed(tmp_path)


def test_a_lost_expert_is_refused(tmp_path: Path) -> None:
    family_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "layers.1." in name and "experts.2." in name]:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.\w+ is \(3, .* but \(2, "):
        streamed(tmp_path)

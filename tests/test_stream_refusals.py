"""What cannot be streamed is refused before anything is computed, and what layers may hand on to each other."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_models import (
    ARGUMENTS,
    SAMPLES,
    by_autograd,
    edit_config,
    family_model,
    largest_difference,
    save,
    save_in_shards,
    stream,
)

from spectral_fast.adapter import Adapter
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.calibration.streaming.skeleton import load_skeleton
from spectral_fast.calibration.streaming.stream import streamed


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    edit_config(tmp_path / "base", lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(ValueError, match=r"is quantised \(bitsandbytes\).*run without --stream"):
        stream(tmp_path)


def test_an_adapter_that_changes_the_base_weights_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match=r"changes the base weights.*run without --stream"):
        stream(tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_with_biases_of_the_base_is_refused(bias: str, tmp_path: Path) -> None:
    save(tmp_path, changes={"attention_bias": True}, bias=bias)
    with pytest.raises(ValueError, match=rf"has its own biases .*bias={bias}.*run without --stream"):
        stream(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    save_in_shards(family_model("llama", hidden_size=64), tmp_path / "other")
    with pytest.raises(ValueError, match="was made for another base model"):
        load_skeleton(str(tmp_path / "other"), ModelOptions(device="cpu"), Adapter.open(tmp_path / "adapter"))


def test_a_trunk_that_computes_between_its_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    class Between(list):  # type: ignore[type-arg]
        def __getitem__(self, _: Any) -> Iterator[Any]:  # type: ignore[override]
            for layer in self:
                yield lambda hidden, *args, layer=layer, **kwargs: 2 * layer(hidden, *args, **kwargs)

    forward = LlamaModel.forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = self.layers
        self._modules["layers"] = Between(layers)
        try:
            return forward(self, *args, **kwargs)
        finally:
            self._modules["layers"] = layers

    save(tmp_path)
    monkeypatch.setattr(LlamaModel, "forward", changed)
    with pytest.raises(ValueError, match=r"computes something between its layers.*run without --stream"):
        stream(tmp_path)


def test_layers_that_share_keys_and_values_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "gemma4", {"num_kv_shared_layers": 2})
    with pytest.raises(ValueError, match=r"Gemma4ForCausalLM's layers may hand on .*run without --stream"):
        stream(tmp_path)


class Box:
    """An object in which a layer may leave something."""


@pytest.mark.parametrize(
    "shared", [{"seen": 1}, UserDict(seen=1), [], [torch.zeros(1)], set(), Box(), (1, [])], ids=str
)
def test_what_layers_could_hand_on_beside_hidden_states_is_refused(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward
    save(tmp_path)
    monkeypatch.setattr(LlamaModel, "forward", lambda self, *args, **kw: forward(self, *args, **kw, shared=shared))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM's layers may hand on .*run without --stream"):
        stream(tmp_path)


@pytest.mark.parametrize("look", [lambda shared: shared.get(0), lambda shared: shared[0], lambda shared: 0 in shared])
def test_a_layer_may_fill_an_empty_mapping_but_not_look_into_it(
    look: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    def filling(self: Any, *args: Any, shared: Any, **kwargs: Any) -> Any:
        shared[self.self_attn.layer_idx] = args
        return forward_layer(self, *args, **kwargs)

    def looking(self: Any, *args: Any, shared: Any, **kwargs: Any) -> Any:
        look(shared)
        return forward_layer(self, *args, **kwargs)

    model = save(tmp_path)
    wanted = by_autograd(model, ARGUMENTS["batch_size"])
    forward, forward_layer = LlamaModel.forward, LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda self, *args, **kw: forward(self, *args, **kw, shared=UserDict()))
    monkeypatch.setattr(LlamaDecoderLayer, "forward", filling)
    got, _ = stream(tmp_path)
    assert largest_difference(got, wanted) <= 1e-5
    monkeypatch.setattr(LlamaDecoderLayer, "forward", looking)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM's layers may hand on .*run without --stream"):
        stream(tmp_path, 1)


def test_a_forward_that_a_hook_gave_the_embeddings_is_there_again_afterwards(tmp_path: Path) -> None:
    save(tmp_path)
    model, weights = load_skeleton(
        str(tmp_path / "base"), ModelOptions(device="cpu"), Adapter.open(tmp_path / "adapter")
    )
    embeddings = model.get_input_embeddings()
    plain = embeddings.forward
    embeddings.forward = hooked = lambda ids: plain(ids)
    engines = partial(streamed, weights=weights, folder=tmp_path, budget=0)
    calibrate(model, "default", SAMPLES, engines=engines, **ARGUMENTS)
    assert vars(embeddings)["forward"] is hooked


def test_a_module_outside_of_the_layers_is_refused(tmp_path: Path) -> None:
    from spectral_fast.calibration.streaming.stream import Streamed

    save(tmp_path)
    model, weights = load_skeleton(
        str(tmp_path / "base"), ModelOptions(device="cpu"), Adapter.open(tmp_path / "adapter")
    )
    name = "base_model.model.model.norm"
    engine = Streamed(model, "default", {name: None}, weights, tmp_path, 0)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"model\.norm is in no decoder layer.*run without --stream"):
        _ = engine.by_part

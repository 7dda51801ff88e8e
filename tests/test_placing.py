"""Base models that are spread by a device map or quantised in memory, probed like any other."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, with_lora

from spectral_fast import Adapter, ModelOptions, calibrate
from spectral_fast.calibration.data import Example
from spectral_fast.calibration.model import load_model
from spectral_fast.sensitivity import Sensitivity

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # bitsandbytes wants whole blocks of 64
EXAMPLES = [Example.continuation(range(i, 20), 4 + i) for i in range(5)]


def with_bitsandbytes(test: Any) -> Any:
    missing = importlib.util.find_spec("bitsandbytes") is None
    return pytest.mark.skipif(missing, reason="bitsandbytes is not installed")(
        pytest.mark.filterwarnings("ignore")(test)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Adapter]:
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_llama(**SIZES)
    base.save_pretrained(folder / "base")
    with_lora(base).save_pretrained(folder / "adapter")
    return str(folder / "base"), Adapter.open(folder / "adapter")


def difference(got: Sensitivity, wanted: Sensitivity) -> float:
    return max(
        float((got.modules[name].g - module.g).norm() / module.g.norm()) for name, module in wanted.modules.items()
    )


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_a_device_map_gives_the_same_g(saved: tuple[str, Adapter], device_map: str) -> None:
    wanted = calibrate(load_model(saved[0], ModelOptions(), saved[1]), "default", EXAMPLES)
    spread = load_model(saved[0], ModelOptions(device_map=device_map, dtype="fp32"), saved[1])
    assert difference(calibrate(spread, "default", EXAMPLES), wanted) <= 1e-6


def test_a_model_with_the_hooks_of_a_dispatch_gives_the_same_g(saved: tuple[str, Adapter]) -> None:
    from accelerate import dispatch_model

    model = load_model(saved[0], ModelOptions(), saved[1])
    wanted = calibrate(model, "default", EXAMPLES)
    names = [
        name for name, _ in model.named_modules() if name.count(".") == 4 or name.endswith(("tokens", "norm", "emb"))
    ]
    dispatched = dispatch_model(model, dict.fromkeys([*names, "base_model.model.lm_head"], "cpu"), force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in dispatched.modules())
    assert difference(calibrate(dispatched, "default", EXAMPLES), wanted) <= 1e-6


def test_a_model_that_does_not_fit_the_gpus_is_sent_to_streaming(
    saved: tuple[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    def offloaded(base_model: str, **_: Any) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model)), {"missing_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offloaded)
    with pytest.raises(ValueError, match=r"larger than all GPUs together: model\.embed_tokens\.weight and 29 others"):
        load_model(saved[0], ModelOptions(device_map="auto"), saved[1])


def test_a_device_and_a_device_map_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="--device cpu and --device_map auto exclude each other"):
        ModelOptions(device="cpu", device_map="auto")


def four_bits(saved: tuple[str, Adapter], dtype: str) -> Any:
    return load_model(saved[0], ModelOptions(load_in_4bit=True, dtype=dtype), saved[1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@with_bitsandbytes
def test_g_of_a_quantised_base_is_that_of_its_weights_put_back(saved: tuple[str, Adapter], dtype: str) -> None:
    import bitsandbytes

    quantised, plain = four_bits(saved, dtype), load_model(saved[0], ModelOptions(dtype=dtype), saved[1])
    layers = [(name, m) for name, m in quantised.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 3 * 7
    for name, layer in layers:
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.get_submodule(name).weight.data.copy_(weight)
    training = [name for name, module in quantised.named_modules() if module.training]
    got = calibrate(quantised, "default", EXAMPLES)
    assert [name for name, module in quantised.named_modules() if module.training] == training
    assert len(got.modules) == 9
    assert difference(got, calibrate(plain, "default", EXAMPLES)) <= (1e-6 if dtype == "fp32" else 1e-2)
    assert difference(calibrate(quantised, "default", EXAMPLES), got) == 0.0


@with_bitsandbytes
def test_weights_that_were_packed_for_inference_are_refused(saved: tuple[str, Adapter]) -> None:
    model = four_bits(saved, "bf16")
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj.base_layer")
    layer.weight.quant_state.packing_format_for_cpu = True  # as on processors with bfloat16 after a generation
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.down_proj\.base_layer: bitsandbytes packed its 4-bit weights"
    ):
        calibrate(model, "default", EXAMPLES)


def test_without_bitsandbytes_the_error_says_what_to_install(
    saved: tuple[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(RuntimeError, match=r"--load_in_4bit needs bitsandbytes.*spectral-fast\[bnb\]"):
        load_model(saved[0], ModelOptions(load_in_4bit=True))

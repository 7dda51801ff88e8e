"""A base model with an adapter on it whose base weights are not in memory: they come one part at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectral_fast.adapter import Adapter
from spectral_fast.adapter.naming import changes_base
from spectral_fast.calibration.checkpoint import INDEX, SINGLE, check_checkpoint, checkpoint_files
from spectral_fast.calibration.model import check_fit, check_whole, from_pretrained
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.calibration.packed.decoder import Decoder
from spectral_fast.calibration.streaming.weights import INSTEAD, Weights
from spectral_fast.tensorfile import SafetensorsFile


def load_skeleton(base_model: str, options: ModelOptions, adapter: Adapter) -> tuple[Any, Weights]:
    """The PEFT model as `load_model` gives it, its base weights on the meta device, and what fills them in.

    Raises:
        FileNotFoundError: the base model is not to be had, or not as safetensors.
        ValueError: it cannot be streamed (quantised, or layers that are not in one list), its checkpoint does not
            fit its config, the adapter does not fit it, or changes its weights or biases.
    """
    from peft import PeftModel
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, base_model, options)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method", "an unknown method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"{base_model} is quantised ({method}), which --stream cannot read layer by layer; {INSTEAD}")
    if changes_base(adapter.config):
        init = adapter.config["init_lora_weights"]
        raise ValueError(f"{adapter.path} changes the base weights (init_lora_weights={init}); {INSTEAD}")
    if (bias := adapter.config.get("bias") or "none") != "none":
        raise ValueError(f"{adapter.path} has its own biases of the base model (bias={bias}); {INSTEAD}")
    files = checkpoint_files(base_model, options.cache_dir)
    if not files:
        raise FileNotFoundError(
            f"--stream reads {SINGLE} or the shards that {INDEX} names, and {base_model} has neither: save the model "
            f"as safetensors, or {INSTEAD}"
        )
    check_checkpoint(base_model, files, config)
    device, dtype = options.resolved()
    if not isinstance(dtype, torch.dtype):
        dtype = config.dtype or _dtype_of(files[0])
    model = empty_model(config, dtype, options.trust_remote_code)
    check_whole(adapter)
    check_fit(model, adapter.modules.values(), base_model, adapter.path)
    decoder = Decoder(model)
    try:
        layers = f"{decoder.prefix}.{decoder.layers[0]}"
    except ValueError as error:
        raise ValueError(f"{error}, and cannot be streamed; {INSTEAD}") from error
    weights = Weights(model, files, layers, device)
    with weights.placeholders():
        wrapped = PeftModel.from_pretrained(model, str(adapter.path), low_cpu_mem_usage=True)
    for path, module in wrapped.named_modules():
        copied = ".modules_to_save." in path  # the adapter's own copy of a module, in the model's dtype
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None and not value.is_meta:
                moved = value.detach().to(device, dtype if copied and value.is_floating_point() else value.dtype)
                setattr(module, name, nn.Parameter(moved) if name in module._parameters else moved)
    return wrapped.eval(), weights


def empty_model(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The causal language model of a config without weights: parameters on the meta device, buffers computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval()


def _dtype_of(file: Path) -> torch.dtype:
    """Of the first floating-point tensor in a checkpoint file."""
    dtypes = [info.dtype for info in SafetensorsFile(file).tensors.values() if info.dtype.is_floating_point]
    return dtypes[0] if dtypes else torch.float32

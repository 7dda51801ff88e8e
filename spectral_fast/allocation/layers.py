"""The matrices of a model's linear layers and convolutions, from its checkpoint one at a time, or from memory."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectral_fast.calibration.checkpoint import (
    FLOATS,
    INDEX,
    SINGLE,
    check_checkpoint,
    check_nothing_missing,
    checkpoint_files,
)
from spectral_fast.calibration.model import from_pretrained
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.calibration.streaming.tensors import Tensors

KINDS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution.

    Attributes:
        index: its place among all modules of the model, from 1.
        name: full name of the module.
        shape: of its weight, (out, in) or (out, in / groups, height, width).
        groups: of a convolution; 1 for a linear layer.
        nbytes: that its weight takes while it is read.
        read: gives the weight, floating point.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    groups: int
    nbytes: int
    read: Callable[[], Tensor]

    @property
    def sides(self) -> tuple[int, int]:
        """Smaller and larger side of its matrices, (out, in) for each position of a kernel."""
        return min(self.shape[:2]), max(self.shape[:2])

    @property
    def cost(self) -> int:
        """Parameters of LoRA per rank: A is (r, in), for a convolution (r, in, height, width), and B is (out, r)."""
        return self.shape[0] + math.prod(self.shape[1:])


def layers_of(
    model: Any,
    options: ModelOptions | None = None,
    model_class: str = "auto",
    told: Callable[[str], object] = warnings.warn,
) -> list[Layer]:
    """Every `nn.Linear` and `nn.Conv2d` of a model, each weight once.

    Args:
        model: a model in memory; or a folder or name of one whose weights are read from its safetensors files one by
            one, as each layer is asked for. A checkpoint with quantised weights is loaded as a whole.
        options: where a model comes from (cache_dir, trust_remote_code); the rest is not used.
        model_class: transformers class whose module names are wanted, e.g. AutoModelForSequenceClassification; layers
            that the checkpoint lacks are then left out. "auto" is the class that wrote the checkpoint.
        told: is given a sentence on modules that are neither, but have matrices too; a Python warning by default.

    Raises:
        FileNotFoundError: it is not to be had, or not as safetensors.
        TypeError: `model` is neither a name nor a module.
        ValueError: no such layer, weights that are missing, or quantised in a way that cannot be undone here.
    """
    if isinstance(model, nn.Module):
        found = list(_in_memory(model, told))
    elif isinstance(model, (str, os.PathLike)):
        found = _from_files(str(model), options or ModelOptions(), model_class, told)
    else:
        raise TypeError(f"model must be a folder, a name or a torch module; got {type(model).__name__}")
    if not found:
        raise ValueError(f"{_named(model)} has neither nn.Linear nor nn.Conv2d layers, so there are no spectra to take")
    return found


def _modules(model: nn.Module) -> Iterator[tuple[int, str, Any]]:
    for index, (name, module) in enumerate(model.named_modules(), start=1):
        if isinstance(module, KINDS):
            yield index, name, module


def _tell_of_others(model: nn.Module, told: Callable[[str], object]) -> None:
    """Say which modules have matrices, but are neither linear layers nor convolutions, nor embeddings."""
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
        if not isinstance(module, (*KINDS, nn.Embedding)) and any(len(x) > 1 and min(x[-2:]) > 1 for x in shapes):
            others.setdefault(type(module).__name__, name)
    if others:
        listed = ", ".join(f"{kind} ({name or 'the model itself'})" for kind, name in others.items())
        told(f"neither nn.Linear nor nn.Conv2d, so without spectrum and rank: {listed}, and others of these kinds")


def _in_memory(model: nn.Module, told: Callable[[str], object]) -> Iterator[Layer]:
    if hasattr(model, "peft_config"):
        raise ValueError("the model carries adapters: give the base model, e.g. what its unload() returns")
    _tell_of_others(model, told)
    seen = set()
    for index, name, module in _modules(model):
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            shape = _shape(module)
            # What is not floating point yet is dequantised, to float32 at most.
            size = module.weight.element_size() if module.weight.dtype in FLOATS else 4
            groups = getattr(module, "groups", 1)
            yield Layer(index, name, shape, groups, math.prod(shape) * size, partial(_dense, module, name))


def _shape(module: Any) -> tuple[int, ...]:
    """Of the weight that is meant; a packed one has another."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def _dense(module: Any, name: str) -> Tensor:
    """The weight as floating-point numbers."""
    weight: Tensor = module.weight.detach()
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device or offloaded: give the model's folder, which is read by layers")
    if weight.dtype not in FLOATS:
        from peft.utils.integrations import dequantize_module_weight

        try:
            weight = dequantize_module_weight(module).detach()
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} is {str(weight.dtype).removeprefix('torch.')} ({type(module).__name__}), and PEFT knows no "
                f"way to dequantise it ({error}); give the model that it was quantised from"
            ) from error
    elif hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
        weight = weight.dequantize()
    if tuple(weight.shape) != _shape(module) or weight.dtype not in FLOATS:
        raise ValueError(
            f"{name} should be {_shape(module)} floating-point numbers; dequantised it is {tuple(weight.shape)} "
            f"{str(weight.dtype).removeprefix('torch.')}; give the model that it was quantised from"
        )
    return weight


def _from_files(base_model: str, options: ModelOptions, model_class: str, told: Callable[[str], object]) -> list[Layer]:
    config, factory = _config_and_factory(base_model, options, model_class)
    if getattr(config, "quantization_config", None) is not None:
        model, loading = from_pretrained(factory, base_model, options, output_loading_info=True)
        check_nothing_missing(base_model, type(model).__name__, loading["missing_keys"])
        return list(_in_memory(model, told))
    model, tensors = empty_and_tensors(base_model, options, model_class)
    _tell_of_others(model, told)
    found, sources, missing = [], set(), []
    for index, name, module in _modules(model):
        source = tensors.source(f"{name}.weight")
        if source is None:
            missing.append(f"{name}.weight")
        elif source not in sources:
            sources.add(source)
            nbytes, _ = tensors.stored(source)
            groups = getattr(module, "groups", 1)
            found.append(Layer(index, name, _shape(module), groups, nbytes, partial(tensors.read, source)))
    if model_class == "auto":
        check_nothing_missing(base_model, type(model).__name__, missing)
    return found


def empty_and_tensors(base_model: str, options: ModelOptions, model_class: str = "auto") -> tuple[Any, Tensors]:
    """A model whose parameters are on the meta device, and its tensors in its safetensors files.

    Args:
        base_model: folder or name.
        options: where it comes from (cache_dir, trust_remote_code).
        model_class: as in `layers_of`.

    Raises:
        FileNotFoundError: it is not to be had, or not as safetensors.
        ValueError: its weights are quantised or damaged.
    """
    config, factory = _config_and_factory(base_model, options, model_class)
    files = weight_files(base_model, options)
    model = _empty(factory, config, options.trust_remote_code)
    return model, Tensors(model, files)


def weight_files(base_model: str, options: ModelOptions) -> list[Path]:
    """The safetensors files of a model, checked.

    Raises:
        As `empty_and_tensors`.
    """
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, base_model, options)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{base_model} is quantised: give the model that it was quantised from")
    files = checkpoint_files(base_model, options.cache_dir)
    if not files:
        raise FileNotFoundError(
            f"{base_model} has neither {SINGLE} nor {INDEX}: save it as safetensors, or give the model in memory"
        )
    check_checkpoint(base_model, files, config)
    return files


def _config_and_factory(base_model: str, options: ModelOptions, model_class: str) -> tuple[Any, Any]:
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, base_model, options)
    return config, _factory(config, model_class)


def _factory(config: Any, model_class: str) -> Any:
    import transformers

    if model_class != "auto":
        found = getattr(transformers, model_class, None)
        if not hasattr(found, "from_pretrained"):
            raise ValueError(f"model_class should be a class of transformers that loads models; got {model_class!r}")
        return found
    remote = getattr(config, "auto_map", None) or {}
    wrote = list(config.architectures or [])
    names = [name for name in remote if name.startswith("AutoModel")]
    names = sorted(names, key=lambda name: str(remote[name]).rpartition(".")[2] not in wrote) or wrote
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    names.append("AutoModelForCausalLM" if causal else "AutoModel")  # where config.json does not say
    return next(getattr(transformers, name) for name in names if hasattr(transformers, name))


def _empty(factory: Any, config: Any, trust_remote_code: bool) -> Any:
    """The model without weights: its parameters are on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if hasattr(factory, "from_config"):
            return factory.from_config(config, trust_remote_code=trust_remote_code)
        return factory(config)


def _named(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)

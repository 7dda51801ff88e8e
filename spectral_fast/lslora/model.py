"""PEFT's model of an LS-LoRA, and its place in PEFT's registers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from peft import LoraModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from spectral_fast.lslora.config import LSLoraConfig, SplineType
from spectral_fast.lslora.layer import NO_MERGE, SplineLayer, spline_layer
from spectral_fast.splines import PARAMETERS, VALUES, Spline


class LSLoraModel(LoraModel):  # type: ignore[misc]
    """A base model whose linear layers have LoRA and a spline after it; PEFT makes it from an `LSLoraConfig`."""

    tuner_layer_cls = SplineLayer

    @staticmethod
    def _create_new_module(lora_config: LSLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        made = spline_layer(target)
        if made is None:
            raise ValueError(
                f"LS-LoRA is for linear layers of torch and of bitsandbytes; {kwargs['target_name']} is of class "
                f"{type(target).__name__}: leave it out of target_modules"
            )
        lora_config.fan_in_fan_out = False
        return made(target, adapter_name, config=lora_config, **kwargs)

    def _check_merge_allowed(self) -> NoReturn:
        raise ValueError(NO_MERGE)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Impossible: a sum of learned functions is no such function.

        Raises:
            ValueError: always.
        """
        raise ValueError("LS-LoRA adapters cannot be combined into one: a sum of learned functions is no such function")

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *_: Any) -> NoReturn:
        raise ValueError("path_initial_model_for_weight_conversion is for plain LoRA: save the adapter as it is")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LSLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> Any:
        # PEFT warns of missing tensors only, and the layer would be an LoRA with a new spline.
        for key in state_dict:
            name, factor, _ = key.rpartition(".lora_A.weight")
            absent = [f"{name}.{part}" for part in PARAMETERS if f"{name}.{part}" not in state_dict] if factor else []
            if absent:
                raise ValueError(f"the adapter is damaged, or none of LS-LoRA: it has {key} and no {absent[0]}")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def register() -> None:
    """Make PEFT know the method, so that `get_peft_model` and `PeftModel.from_pretrained` do.

    PEFT without this package refuses an adapter of it, with KeyError: 'LSLORA'.

    Raises:
        RuntimeError: PEFT is too old.
    """
    if "config" not in inspect.signature(LoraLayer.update_layer).parameters:
        from peft import __version__

        raise RuntimeError(f"LS-LoRA is known to work with PEFT 0.21.2, and {__version__} is too old: update peft")
    PEFT_TYPE_TO_CONFIG_MAPPING[SplineType.LSLORA] = LSLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[SplineType.LSLORA] = LSLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[SplineType.LSLORA] = LSLoraModel.prefix


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SplineLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, SplineLayer) and adapter_name in module.spline_options:
            yield name, module


def splines_of(model: nn.Module, adapter_name: str = "default") -> dict[str, Spline]:
    """Module -> a copy of its spline."""
    return {name: layer.spline(adapter_name) for name, layer in _layers(model, adapter_name)}


def spline_parameters(model: nn.Module, adapter_name: str = "default") -> Iterator[nn.Parameter]:
    """Values and scales of all layers: num_knots + 2 numbers each."""
    for _, layer in _layers(model, adapter_name):
        yield from (getattr(layer, name)[adapter_name] for name in PARAMETERS)


def spline_penalty(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """What is to be added to the loss, see `SplineOptions.penalty`.

    Raises:
        ValueError: the model has no splines under this name.
    """
    found = [layer for _, layer in _layers(model, adapter_name)]
    if not found:
        raise ValueError(f"the model has no LS-LoRA adapter {adapter_name!r}")
    values = torch.stack([getattr(layer, VALUES)[adapter_name].float() for layer in found])
    return found[0].spline_options[adapter_name].penalty(values)

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

    def _create_and_replace(
        self, lora_config: LSLoraConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(target, LoraLayer) and not isinstance(target, SplineLayer):
            raise ValueError(
                f"the model has plain LoRA where the LS-LoRA {adapter_name!r} shall be, which would have no spline "
                "there: take it off first"
            )
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

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


def _layers(model: nn.Module, adapter_name: str | None) -> Iterator[tuple[str, SplineLayer, str]]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SplineLayer)}
    if adapter_name is None:
        active = sorted({a for layer in layers.values() for a in layer.active_adapters if a in layer.spline_options})
        if len(active) > 1:
            raise ValueError(f"several LS-LoRA adapters are active, {', '.join(active)}: say which is meant")
        adapter_name = active[0] if active else ""
    for name, layer in layers.items():
        if adapter_name in layer.spline_options:
            yield name, layer, adapter_name


def splines_of(model: nn.Module, adapter_name: str | None = None) -> dict[str, Spline]:
    """Module -> a copy of its spline.

    Args:
        model: with LS-LoRA.
        adapter_name: None for the active one.

    Raises:
        ValueError: several are active, and none is named.
    """
    return {name: layer.spline(adapter) for name, layer, adapter in _layers(model, adapter_name)}


def spline_parameters(model: nn.Module, adapter_name: str | None = None) -> Iterator[nn.Parameter]:
    """Values and scales of all layers: num_knots + 2 numbers each; arguments as for `splines_of`."""
    for _, layer, adapter in _layers(model, adapter_name):
        yield from (getattr(layer, name)[adapter] for name in PARAMETERS)


def spline_penalty(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """What is to be added to the loss, see `SplineOptions.penalty`; arguments as for `splines_of`.

    Raises:
        ValueError: the model has no splines under this name, or none that are active; or several, and none is named.
    """
    found = list(_layers(model, adapter_name))
    if not found:
        which = "that is active" if adapter_name is None else repr(adapter_name)
        raise ValueError(f"the model has no LS-LoRA adapter {which}")
    values = torch.stack([getattr(layer, VALUES)[adapter].float() for _, layer, adapter in found])
    _, first, adapter = found[0]
    return first.spline_options[adapter].penalty(values)

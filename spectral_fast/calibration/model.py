"""Load a base model with an adapter on it, and say clearly when the two do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectral_fast.adapter import Adapter, LoraModule
from spectral_fast.adapter.hub import like
from spectral_fast.adapter.naming import changes_base
from spectral_fast.calibration.checkpoint import check_checkpoint, check_nothing_missing, checkpoint_files
from spectral_fast.calibration.options import ModelOptions

PEFT_PREFIX = "base_model.model."


def load_tokenizer(base_model: str, options: ModelOptions) -> Any:
    """The base model's tokenizer.

    Raises:
        FileNotFoundError: if `base_model` is neither a folder with a tokenizer nor to be had from the hub.
    """
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, base_model, options)


def load_model(base_model: str, options: ModelOptions, adapter: Adapter | None = None, **kwargs: Any) -> Any:
    """A causal language model in evaluation mode, with the adapter (if any) loaded by PEFT under the name "default".

    Args:
        base_model: folder or hub name.
        options: device, dtype and source.
        adapter: to be loaded on it.
        kwargs: what else transformers' `from_pretrained` shall know, e.g. another quantisation.

    Raises:
        FileNotFoundError: if `base_model` is neither a model folder nor to be had from the hub.
        RuntimeError: for `load_in_4bit` without bitsandbytes.
        ValueError: if the adapter was made for another base model (names or shapes that do not fit), or if
            `device_map` leaves weights for which no GPU has room.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    device, dtype = options.resolved()
    how: dict[str, Any] = {"dtype": dtype, **kwargs}
    if options.load_in_4bit:
        how["quantization_config"] = _four_bits(dtype)
    placed = options.device_map != "none" or "quantization_config" in how
    if placed:
        how["device_map"] = {"": device} if options.device_map == "none" else options.device_map
    config = from_pretrained(AutoConfig, base_model, options)
    check_checkpoint(base_model, checkpoint_files(base_model, options.cache_dir), config)
    model, told = from_pretrained(AutoModelForCausalLM, base_model, options, output_loading_info=True, **how)
    check_nothing_missing(base_model, type(model).__name__, told["missing_keys"])
    _check_in_memory(model, base_model)
    if adapter is not None:
        check_whole(adapter)
        check_fit(model, adapter.modules.values(), base_model, adapter.path)
        model = PeftModel.from_pretrained(model, str(adapter.path))
    return (model if placed else model.to(device)).eval()


@contextmanager
def attached(model: Any, adapter: str | Adapter) -> Iterator[tuple[Any, str]]:
    """Give the PEFT model that carries an adapter, and the adapter's name in it.

    Args:
        model: a PEFT model, of which `adapter` is a name; or a model without adapters, which carries one from its
            files within the context, and is afterwards what it was before.
        adapter: a name, or an adapter.

    Raises:
        ValueError: if the adapter does not fit the model, changes its weights, or the model carries others.
    """
    if isinstance(adapter, str):
        yield model, adapter
        return
    from peft import PeftModel

    if hasattr(model, "peft_config"):
        raise ValueError("the model carries adapters already; load this one with load_adapter(), and give its name")
    if changes_base(adapter.config):
        raise ValueError(f"{adapter.path} changes the base weights; load it with PEFT, and give its name")
    check_whole(adapter)
    check_fit(model, adapter.modules.values(), type(model).__name__, adapter.path)
    with _restored(model, adapter.weights.tensors):
        yield PeftModel.from_pretrained(model, str(adapter.path)), "default"


@contextmanager
def _restored(model: nn.Module, keys: Iterable[str]) -> Iterator[None]:
    """Afterwards the model has its own modules, hooks and flags again, and so its configuration.

    PEFT's unload() leaves copies of `modules_to_save`, overwritten biases and embeddings, and hooks.

    Args:
        model: before PEFT has it.
        keys: of the adapter's file; tensors of the model that they name are overwritten by loading it.
    """
    owners: list[Any] = [*model.modules(), *([model.config] if hasattr(model, "config") else [])]
    attributes = [vars(owner) for owner in owners]
    dicts = [d for own in attributes for d in (own, *(value for value in own.values() if isinstance(value, dict)))]
    before = [d.copy() for d in dicts]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    names = {key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".") for key in keys}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    overwritten = [(tensor, tensor.detach().clone()) for name, tensor in tensors if name in names]
    try:
        yield
    finally:
        for d, content in zip(dicts, before, strict=True):  # in place: handles of hooks refer to these very dicts
            d.clear()
            d.update(content)
        with torch.no_grad():
            for tensor, content in overwritten:
                tensor.copy_(content)
        for p, flag in flags:
            p.requires_grad_(flag)


def _check_in_memory(model: nn.Module, base_model: str) -> None:
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:  # accelerate brings them as they are needed, but the backward pass would keep all that were brought
        raise ValueError(
            f"{base_model} is larger than all GPUs together: {absent[0]} and {len(absent) - 1} others found no place; "
            "`spectral-fast probe --stream` needs two layers in memory only"
        )


def _four_bits(dtype: torch.dtype | str) -> Any:
    """How bitsandbytes shall quantise: QLoRA's NF4, its scales quantised, too.

    Raises:
        RuntimeError: where bitsandbytes is not installed.
    """
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise RuntimeError(
            "--load_in_4bit needs bitsandbytes, which is not installed: pip install 'spectral-fast[bnb]'"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def from_pretrained(factory: Any, base_model: str, options: ModelOptions, **kwargs: Any) -> Any:
    """What `factory.from_pretrained` gives.

    Raises:
        FileNotFoundError: it is no folder of a model, nor to be had from the hub.
        RuntimeError: it needs a package that is not installed.
    """
    if Path(base_model).is_dir() and not (Path(base_model) / "config.json").is_file():
        raise FileNotFoundError(f"{base_model} has no config.json: it is not a transformers model folder")
    try:
        return factory.from_pretrained(
            base_model, cache_dir=options.cache_dir, trust_remote_code=options.trust_remote_code, **kwargs
        )
    except ImportError as error:
        raise RuntimeError(f"base model {base_model!r} needs a package that is not installed: {error}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"cannot load base model {base_model!r}: not a complete local folder, and not to be had from the hub "
            f"({str(error).splitlines()[0]}){like(Path(base_model))}"
        ) from error


def check_whole(adapter: Adapter) -> None:
    """Refuse an adapter with half of a pair of factors: whoever loads it makes up the other half.

    Raises:
        ValueError: naming the module.
    """
    for name, why in adapter.carried.items():
        if why.endswith("is missing"):
            raise ValueError(f"{adapter.path} is damaged: {name} has one factor only, {why}")


def check_fit(model: nn.Module, modules: Iterable[LoraModule], base_model: str, lora_path: Path) -> None:
    """Refuse an adapter whose modules the base model lacks or has in another shape.

    Raises:
        ValueError: naming the first module that does not fit, with both shapes.
    """
    for module in modules:
        name = module.name.removeprefix(PEFT_PREFIX)
        try:
            target = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{lora_path} was made for another base model: it adapts {name}, which {base_model} does not have"
            ) from None
        shape = _linear_shape(target)
        if shape is not None and shape != (module.m, module.n):
            raise ValueError(
                f"{lora_path} was made for another base model: its {name} is {module.m} x {module.n} "
                f"(out x in features), but in {base_model} it is {shape[0]} x {shape[1]}"
            )


def _linear_shape(module: Any) -> tuple[int, int] | None:
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if hasattr(module, "nf"):  # transformers' Conv1D
        return int(module.nf), int(module.nx)
    return None

"""Two checkpoints of one model, tensor by tensor: the matrices that LoRA can hold a change of, and all the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_fast.adapter.folder import is_finite
from spectral_fast.allocation.layers import empty_and_tensors, weight_files
from spectral_fast.calibration.checkpoint import check_nothing_missing
from spectral_fast.calibration.model import from_pretrained
from spectral_fast.calibration.options import ModelOptions
from spectral_fast.calibration.streaming.tensors import Tensors
from spectral_fast.tensorfile import TensorInfo

_BLOCK = 1 << 22  # numbers of a difference that are in memory at a time


@dataclass(frozen=True)
class Pair:
    """One tensor in both checkpoints.

    Attributes:
        name: of the tensor in the model, and of those that are tied to it.
        info: dtype and shape in the tuned checkpoint.
        base: gives the tensor before.
        tuned: gives it afterwards.
        reason: why LoRA cannot hold its change; empty if it can.
        transposed: stored as (in, out), as in GPT-2.
    """

    name: str
    info: TensorInfo
    base: Callable[[], Tensor]
    tuned: Callable[[], Tensor]
    reason: str = ""
    transposed: bool = False
    tied: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        """Name of the module that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a matrix."""
        first, second = self.info.shape
        return (second, first) if self.transposed else (first, second)

    def changed(self) -> bool:
        """Whether a value differs.

        Raises:
            ValueError: one is not finite afterwards.
        """
        base, tuned = self.base(), self.tuned()
        if base.shape == tuned.shape and torch.equal(base, tuned):
            return False
        if tuned.is_floating_point() and tuned.numel() and not is_finite(tuned):
            raise ValueError(f"{self.name}: the tuned weights have NaN or infinite values; mend the checkpoint first")
        return True


@dataclass(frozen=True)
class Checkpoints:
    """What two checkpoints have in common.

    Attributes:
        matrices: of linear layers that were asked for.
        others: the rest.
        children: modules that have modules in them.
        model_class: name of the model's class.
        files: of the base model, and of the tuned one.
        warnings: what to know before trusting a difference.
    """

    matrices: list[Pair]
    others: list[Pair]
    children: set[str]
    model_class: str
    files: tuple[list[Path], list[Path]]
    warnings: list[str]


def differences(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of tuned - base, a block at a time; as `range_finder` takes them."""
    step = _rows(base)
    for first in range(0, len(base), step):
        part = slice(first, first + step)
        yield first, tuned[part].to(dtype, copy=True).sub_(base[part])


def _rows(x: Tensor) -> int:
    return max(1, _BLOCK // max(1, x[0].numel())) if x.ndim and len(x) else 1


def open_checkpoints(
    base_model: str, tuned_model: str, target_modules: Sequence[str], options: ModelOptions, model_class: str = "auto"
) -> Checkpoints:
    """Match the tensors of two checkpoints by their names in the model that the base's config describes.

    Args:
        base_model: folder or name.
        tuned_model: folder or name.
        target_modules: last components of linear layers' names; all-linear is all but the output head, as in PEFT.
        options: where they come from (cache_dir, trust_remote_code).
        model_class: transformers class whose module names are wanted; "auto" is the class that wrote the base.

    Raises:
        FileNotFoundError: one is not to be had, or not as safetensors.
        ValueError: one is quantised or damaged, they are not checkpoints of one model, or a target is not in it.
    """
    model, base = empty_and_tensors(base_model, options, model_class)
    tuned = Tensors(model, weight_files(tuned_model, options))
    modules = dict(model.named_modules())
    shared = _shared_by_config(model, tuned_model, options)
    kind = type(model).__name__
    wanted = _targets(modules, model, target_modules)
    pairs: dict[tuple[str, str], Pair] = {}
    missing: dict[str, list[str]] = {base_model: [], tuned_model: []}
    dtypes: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for name, meant in model.state_dict().items():
        before, after = base.source(name), tuned.find(name) or tuned.find(shared.get(name, name))
        if before is None or after is None:
            for of, source in ((base_model, before), (tuned_model, after)):
                if source is None and (before, after) != (None, None):
                    missing[of].append(name)
            continue
        module, meta = name.rpartition(".")[0], tuned.meta(after)
        if pair := pairs.get((before, after)):
            pair.tied.append(name)
            if pair.reason and module in wanted:
                pairs[before, after] = replace(pair, reason=f"{pair.reason}, and {name} is the same tensor")
            continue
        reason = _why_not(name, modules[module], meant.ndim)
        if meta.shape != meant.shape:
            reason = f"{tuple(meant.shape)} in {base_model}, but {tuple(meta.shape)} in {tuned_model}"
            if module in wanted:
                raise ValueError(f"{name} is {reason}: they are not checkpoints of one model")
        elif not reason and module not in wanted:
            reason = "not among --target_modules"
        dtypes[base.meta(before).dtype, meta.dtype] += 1
        pairs[before, after] = Pair(
            name,
            TensorInfo(meta.dtype, tuple(meta.shape)),
            partial(base.read, before),
            partial(tuned.read, after),
            reason,
            transposed=not isinstance(modules[module], nn.Linear),
        )
    for of, names in missing.items():
        check_nothing_missing(of, kind, names)
    warnings = [
        f"{count} tensors are {_short(before)} in {base_model} and {_short(after)} in {tuned_model}: the rounding is "
        "part of their difference"
        for (before, after), count in dtypes.items()
        if before != after
    ]
    return Checkpoints(
        [pair for pair in pairs.values() if not pair.reason],
        [pair for pair in pairs.values() if pair.reason],
        {name for name, module in modules.items() if next(module.children(), None) is not None},
        kind,
        (base.files, tuned.files),
        warnings,
    )


def _shared_by_config(model: Any, tuned_model: str, options: ModelOptions) -> dict[str, str]:
    """The output head -> the embedding, if the tuned model's config ties them, whatever the base's says."""
    from transformers import AutoConfig

    tuned = from_pretrained(AutoConfig, tuned_model, options)
    ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("output", "input")]
    if None in ends or not getattr(tuned.get_text_config(), "tie_word_embeddings", False):
        return {}
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return {names[ends[0]]: names[ends[1]]}


def _linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _targets(modules: dict[str, Any], model: Any, target_modules: Sequence[str]) -> set[str]:
    """Names of the linear layers that are wanted."""
    linear = {name: name.rpartition(".")[2] for name, module in modules.items() if _linear(module)}
    if tuple(target_modules) == ("all-linear",):
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return {name for name in linear if modules[name] is not head}
    components = Counter(linear.values())
    if unknown := [name for name in target_modules if name not in components]:
        has = ", ".join(f"{name} ({count})" for name, count in components.items())
        raise ValueError(f"target_modules: {unknown[0]} is no linear layer of {type(model).__name__}, which has {has}")
    return {name for name, component in linear.items() if component in target_modules}


def _why_not(name: str, module: Any, dimensions: int) -> str:
    """Why LoRA cannot hold the change of a tensor; empty if it can."""
    leaf, kind = name.rpartition(".")[2], type(module).__name__
    if _linear(module) and leaf == "weight":
        return ""
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if dimensions < 2:
        return f"a {leaf} of {kind}: a vector has no factors"
    return f"a {leaf} of {kind}, which is no linear layer"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

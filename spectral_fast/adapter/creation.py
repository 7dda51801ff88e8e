"""Adapters that are made rather than rewritten: merged ones, or those extracted from checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from spectral_fast import atomic
from spectral_fast.adapter.folder import WEIGHTS, check_factors
from spectral_fast.adapter.naming import CONFIG, LoraModule, alpha_for, in_model, with_ranks
from spectral_fast.tensorfile import Layout, TensorInfo, writing_safetensors

Other = tuple[TensorInfo, Callable[[], Tensor]]  # what it is, and a function that gives it


def plain_module(name: str, m: int, n: int, r: int, dtype: torch.dtype, scaling: float = 1.0) -> LoraModule:
    """A linear module of a new adapter, with the keys that PEFT gives its factors.

    Args:
        name: with the prefix `base_model.model.`, as PEFT saves it.
        m: out features.
        n: in features.
        r: rank.
        dtype: of both factors.
        scaling: what B A is multiplied by; 1 fits every loader.
    """
    b_key, a_key = (f"{name}.lora_{factor}.weight" for factor in "BA")
    return LoraModule(name, b_key, a_key, m, n, r, dtype, scaling, adapter_name=None)


def new_config(modules: Iterable[LoraModule], others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """adapter_config.json of a new adapter: ranks and scalings of all modules, which are its target modules.

    `r` is the largest rank, and `lora_alpha` that module's; rank_pattern and alpha_pattern follow where they differ.

    Args:
        modules: the modules, at least one.
        others: more entries, such as base_model_name_or_path, or target_modules in other words.

    Raises:
        ValueError: there are no modules, or no pattern can tell them apart.
    """
    named = {module.name: module for module in modules}
    if not named:
        raise ValueError("an adapter needs at least one module; none is left to write")
    largest = max(named.values(), key=lambda module: module.r)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": largest.r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [in_model(name) for name in named],
        **(others or {}),
    }
    config["lora_alpha"] = alpha_for(largest.r, largest.scaling, config)
    return with_ranks(config, named, (), {})


@contextmanager
def creating(
    out_dir: Path | str,
    config: Mapping[str, Any],
    modules: Iterable[LoraModule],
    extra_files: Mapping[str, bytes | Callable[[], bytes]] | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    others: Mapping[str, Other] | None = None,
    sources: Sequence[Path] = (),
    overwrite: bool = False,
) -> Iterator[Callable[[str, Tensor, Tensor], None]]:
    """Write a new adapter, one module at a time, in one atomic step.

    Args:
        out_dir: the new folder; it appears complete when the block ends well, or not at all.
        config: adapter_config.json, see `new_config`.
        modules: what it shall have, see `plain_module`.
        extra_files: name -> content of more files; functions are called at the end.
        shapes: key -> stored shape of factors that are not stored as (m, r) and (r, n), as those of convolutions.
        others: key -> dtype, shape and a function giving a tensor that is no factor; called one by one at the end.
        sources: folders that are read meanwhile, which `out_dir` must not touch.
        overwrite: replace an adapter that is in `out_dir`.

    Yields:
        put(name, b (m, r), a (r, n)), for any thread and in any order, in the module's dtype. All must be put.

    Raises:
        ValueError: factors that are not finite or not of the module's dtype and shape, a module that is unknown,
            repeated or missing, or an `out_dir` that overlaps with a source.
        FileExistsError: `out_dir` is not empty, and `overwrite` is off or it is not an adapter.
    """
    named = {module.name: module for module in modules}
    shapes, others, extra_files = shapes or {}, others or {}, extra_files or {}
    for extra in extra_files:
        if PurePath(extra).name != extra or extra in {WEIGHTS[0], CONFIG, ".."}:
            raise ValueError(f"extra_files: {extra!r} must be the name of a file beside {WEIGHTS[0]} and {CONFIG}")
    tensors = {key: info for key, (info, _) in others.items()}
    for module in named.values():
        for key, shape in ((module.b_key, (module.m, module.r)), (module.a_key, (module.r, module.n))):
            tensors[key] = TensorInfo(module.dtype, shapes.get(key, shape))
    check_out_dir(out_dir, sources, overwrite=overwrite)
    with atomic.replace_directory(out_dir, overwrite=overwrite, marker=CONFIG) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with writing_safetensors(folder / WEIGHTS[0], Layout.of(tensors, {"format": "pt"})) as put_tensor:

            def put(name: str, b: Tensor, a: Tensor) -> None:
                if name not in named:
                    raise ValueError(f"{name} is not a module of the adapter that is written to {out_dir}")
                module = named[name]
                check_factors(module, module.r, b, a)
                put_tensor(module.b_key, b.reshape(tensors[module.b_key].shape))
                put_tensor(module.a_key, a.reshape(tensors[module.a_key].shape))

            yield put
            for key, (_, read) in others.items():
                put_tensor(key, read())
        for extra, content in extra_files.items():
            (folder / extra).write_bytes(content if isinstance(content, bytes) else content())


def check_out_dir(out_dir: Path | str, sources: Iterable[Path], *, overwrite: bool = False) -> None:
    """Raise now what `creating` would raise about `out_dir`, before long work."""
    for source in (*sources, None):
        atomic.check_out_dir(out_dir, overwrite=overwrite, source=source, marker=CONFIG)

"""What is merged with what: the modules of all adapters by name, the tensors that come along, and the new config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from spectral_fast.adapter import Adapter, LoraModule, changes_base
from spectral_fast.adapter.creation import Other, new_config, plain_module
from spectral_fast.adapter.naming import in_model
from spectral_fast.toolbox.merging.options import MergeOptions
from spectral_fast.toolbox.merging.spaces import tsv_rank

# Entries of adapter_config.json that say which modules are adapted: one adapter's are all's, or names say it instead.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Those under which a module computes something else than x + s B A x: all adapters must agree.
_MEANING = ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "trainable_token_indices", "lora_bias")
_OWN = {*_TARGETS, *_MEANING, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_OWN |= {"modules_to_save", "bias"}  # those of all adapters, as the tensors are
_BIASES = ("none", "lora_only", "all")
# Of the beginning of a training, which is over: PEFT warns of them, or acts on them.
_BEGINNING = {"init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "peft_version"}
_UNIMPORTANT = {*_BEGINNING, "lora_dropout", "inference_mode", "base_model_name_or_path", "revision"}


@dataclass(frozen=True)
class Part:
    """One adapter's share of a module."""

    source: int
    module: LoraModule


@dataclass(frozen=True)
class Plan:
    """What is merged.

    Attributes:
        parts: name of a module -> the adapters that have it, in their order.
        shapes: name of a module -> stored shapes of lora_B and lora_A, ranks as in the first adapter that has it.
        others: key -> tensor that is no factor, as one adapter has it.
        warnings: what to know of the result.
    """

    parts: dict[str, list[Part]]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    others: dict[str, Other]
    warnings: list[str]

    @classmethod
    def of(cls, sources: Sequence[Adapter], modules: Sequence[Sequence[LoraModule]]) -> Plan:
        """Find what belongs together.

        Args:
            sources: the adapters.
            modules: of each, what to merge.

        Raises:
            ValueError: nothing is selected, shapes disagree, an adapter has what cannot be merged, or tensors that are
                no factors differ.
        """
        parts: dict[str, list[Part]] = {}
        for i, chosen in enumerate(modules):
            for module in chosen:
                parts.setdefault(module.name, []).append(Part(i, module))
        if not parts:
            raise ValueError(f"no module to merge is selected of {', '.join(str(source.path) for source in sources)}")
        shapes = {name: _stored(sources, found[0]) for name, found in parts.items()}
        for name, found in parts.items():
            (b, a), first = shapes[name], found[0]
            for part in found[1:]:
                b_, a_ = _stored(sources, part)
                if (b_[0], b_[2:], a_[1:]) != (b[0], b[2:], a[1:]) or _embeds(part.module) != _embeds(first.module):
                    raise ValueError(
                        f"{name} has lora_B {b} and lora_A {a} in {sources[first.source].path}, {b_} and {a_} in "
                        f"{sources[part.source].path}: adapters of one base model agree in all but the rank"
                    )
        for source in sources:
            _check_source(source)
        alone = _alone(sources, parts) if len(sources) > 1 else []
        return cls(parts, shapes, _others(sources), _warnings(sources) + alone)

    def ranks(self, options: MergeOptions) -> dict[str, int]:
        """The rank of each merged module, as far as it does not depend on singular values: then the largest."""
        space = options.how.space
        largest = max(part.module.r for found in self.parts.values() for part in found)
        ranks = {}
        for name, found in self.parts.items():
            each = [part.module.r for part in found]
            if space == "cat":
                ranks[name] = sum(each)
                continue
            if space == "factors":
                if len(set(each)) > 1:
                    raise ValueError(
                        f"{options.method} adds B and A entry by entry, which takes equal ranks; {name} has ranks "
                        f"{', '.join(map(str, each))}: take svd, cat or core_…, or resize the adapters first"
                    )
                ranks[name] = each[0]
                continue
            side = min(found[0].module.m, found[0].module.n)
            if space == "tsv":
                each = [tsv_rank(r, side, len(each), options.density or 1.0) for r in each]
            limit = side if space == "dense" else min(side, sum(each))
            wanted = options.rank or (largest if space in ("sum", "dense") and options.share_lost is None else limit)
            ranks[name] = min(limit, wanted)
        return ranks

    def scaling(self, weights: Sequence[float], options: MergeOptions) -> float:
        """The scaling of all merged modules: 1, or w s for a concatenation if all share it, so that nothing rounds."""
        products = {weights[part.source] * part.module.scaling for found in self.parts.values() for part in found}
        return products.pop() if options.method == "cat" and len(products) == 1 and min(products) > 0 else 1.0

    def modules(self, ranks: Mapping[str, int], scaling: float, dtype: str | None) -> dict[str, LoraModule]:
        """The merged modules, in the dtype that is given or else the widest of their parts."""
        made = {}
        for name, found in self.parts.items():
            first = found[0].module
            stored = getattr(torch, dtype) if dtype else _widest([part.module for part in found])
            module = plain_module(name, first.m, first.n, ranks[name], stored, scaling)
            if _embeds(first):
                module = replace(module, b_key=f"{name}.lora_embedding_B", a_key=f"{name}.lora_embedding_A")
            made[name] = module
        return made

    def stored_shapes(self, modules: Mapping[str, LoraModule]) -> dict[str, tuple[int, ...]]:
        """Key -> shape in the file, of convolutions with their kernels."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in modules.items():
            b, a = self.shapes[name]
            shapes |= {module.b_key: (b[0], module.r, *b[2:]), module.a_key: (module.r, *a[1:])}
        return shapes

    def config(self, sources: Sequence[Adapter], modules: Mapping[str, LoraModule]) -> dict[str, Any]:
        """adapter_config.json: the first adapter's, but for ranks, scalings and targets."""
        configs = [source.config for source in sources]
        kept = {key: value for key, value in configs[0].items() if key not in _OWN | _BEGINNING}
        kept |= {"inference_mode": True, "init_lora_weights": True, "use_rslora": False}
        kept |= {key: configs[0][key] for key in _MEANING if key in configs[0]}
        complete = all(set(source.modules) <= set(modules) for source in sources)
        if complete and all(_same_targets(configs[0], other) for other in configs[1:]):
            kept |= {key: configs[0][key] for key in _TARGETS if key in configs[0]}
        else:
            kept |= dict.fromkeys(_TARGETS[1:]) | {"target_modules": [in_model(name) for name in modules]}
        saved = [name for config in configs for name in config.get("modules_to_save") or ()]
        kept["modules_to_save"] = list(dict.fromkeys(saved)) or None
        kept["bias"] = max((config.get("bias") or "none" for config in configs), key=_BIASES.index)
        return new_config(modules.values(), kept)


def in_model_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts modules as the usual decoders have them: PEFT draws random masks in this order."""
    return [(int(word), "") if word.isdecimal() else (_ORDER.get(word, len(_ORDER)), word) for word in name.split(".")]


_WORDS = "model embed_tokens layers self_attn q_proj k_proj v_proj o_proj mlp gate_proj up_proj down_proj"
_ORDER = {word: i for i, word in enumerate(_WORDS.split())}


def _embeds(module: LoraModule) -> bool:
    """Whether it is an embedding."""
    return bool(re.search(r"\.lora_embedding_[AB]", module.b_key))


def _widest(modules: Sequence[LoraModule]) -> torch.dtype:
    widest = modules[0].dtype
    for module in modules:
        if module.dtype.itemsize == 1:
            raise ValueError(
                f"{module.name} is stored as {module.dtype}, too coarse for a merged one: give dtype bfloat16"
            )
        widest = torch.promote_types(widest, module.dtype)
    return widest


def _stored(sources: Sequence[Adapter], part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of lora_B and lora_A in the file."""
    tensors = sources[part.source].weights.tensors
    return tensors[part.module.b_key].shape, tensors[part.module.a_key].shape


def _same_targets(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def said(config: Mapping[str, Any], key: str) -> Any:
        value = config.get(key)
        return frozenset(value) if isinstance(value, list) else value

    return all(said(one, key) == said(other, key) for key in _TARGETS)


def _check_source(source: Adapter) -> None:
    if changes_base(source.config):
        raise ValueError(
            f"{source.path}: init_lora_weights={source.config['init_lora_weights']} changes the base weights on "
            "loading, each adapter's in its own way; convert it to plain LoRA first"
        )
    if source.config.get("use_dora"):
        raise ValueError(
            f"{source.path}: DoRA's magnitudes depend on the base weights; merge it into the model instead"
        )
    for name in source.carried_modules:
        reason = source.carried[name]
        if not reason.startswith("belongs to adapter"):
            raise ValueError(f"{source.path}: {name} cannot be merged: {reason}")
    for key, reason in source.carried.items():
        if reason.startswith("bias of a LoRA factor"):
            raise ValueError(f"{source.path}: {key} cannot be merged: {reason}")


def _others(sources: Sequence[Adapter]) -> dict[str, Other]:
    """Tensors beside the factors: only one adapter may have each, unless they are equal."""
    owner: dict[str, Adapter] = {}
    for source in sources:
        for key, reason in source.carried.items():
            if key not in source.weights.tensors or reason.startswith("belongs to adapter"):
                continue
            first = owner.setdefault(key, source)
            if first is not source and not _same_tensor(first, source, key):
                raise ValueError(
                    f"{key} differs between {first.path} and {source.path} and is no LoRA factor ({reason}): "
                    "only one of the adapters may have it"
                )
    return {key: (source.weights.tensors[key], partial(source.weights.read, key)) for key, source in owner.items()}


def _same_tensor(one: Adapter, other: Adapter, key: str) -> bool:
    if one.weights.tensors[key] != other.weights.tensors[key]:
        return False
    a, b = (source.weights.read(key).reshape(-1).view(torch.uint8) for source in (one, other))
    return torch.equal(a, b)


def _alone(sources: Sequence[Adapter], parts: Mapping[str, Sequence[Part]]) -> list[str]:
    """Warnings of adapters that share no module with any other."""
    firsts: dict[int, str] = {}
    for name, found in parts.items():
        for part in found:
            firsts.setdefault(part.source, name)
    shared = {part.source for found in parts.values() if len(found) > 1 for part in found}
    return [
        f"no other adapter has any module of {sources[i].path}, such as {name}: are they of one base model?"
        for i, name in firsts.items()
        if i not in shared
    ]


def _warnings(sources: Sequence[Adapter]) -> list[str]:
    first, warnings = sources[0], []
    for other in sources[1:]:
        base = (first.config.get("base_model_name_or_path"), other.config.get("base_model_name_or_path"))
        if base[0] != base[1]:
            warnings.append(f"the base model of {first.path} is {base[0]}, and that of {other.path} {base[1]}")
        for key in _MEANING:
            if (first.config.get(key) or None) != (other.config.get(key) or None):
                raise ValueError(
                    f"{key} is {first.config.get(key)!r} in {first.path} and {other.config.get(key)!r} in "
                    f"{other.path}: these adapters do not act alike and have no sum"
                )
        keys = {*first.config, *other.config} - _OWN - _UNIMPORTANT
        differ = sorted(key for key in keys if (first.config.get(key) or None) != (other.config.get(key) or None))
        if differ:
            warnings.append(f"{', '.join(differ)} differ; the merged adapter has them from {first.path}")
    return warnings

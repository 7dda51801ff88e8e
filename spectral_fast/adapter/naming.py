"""What PEFT's key names and adapter_config.json say: which tensors are factors, and how they are scaled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from spectral_fast.adapter.patterns import Patterns
from spectral_fast.tensorfile import TensorInfo

CONFIG = "adapter_config.json"

_FACTOR = re.compile(r"^(.*)\.lora_([AB])(?:\.([^.]+))?\.weight$")
_EMBEDDING = re.compile(r"^(.*)\.lora_embedding_([AB])(?:\.([^.]+))?$")
_BIAS = re.compile(r"\.lora_[AB](?:\.[^.]+)?\.bias$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.[^.]+)*$")
_OTHER = re.compile(r"^(.*)\.(lora_\w+)(?:\..*)?$")

# Options of LoraConfig under which the update is not the product of the two stored factors.
_VARIANTS = {
    "use_bdlora": "block-diagonal factors, stored without their zeros",
    "use_qalora": "lora_A acts on pooled inputs",
    "kasa_config": "the update is B diag(d) A",
    "monteclora_config": "the factors are sampled",
    "arrow_config": "several adapters are routed through it",
}
_Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of lora_A and lora_B
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraModule:
    """One editable pair of factors: ΔW = scaling · B A.

    Attributes:
        name: the common prefix of the two keys, e.g. `base_model.model.model.layers.0.self_attn.o_proj`.
        b_key: key of lora_B in the weight file.
        a_key: key of lora_A.
        m: out features.
        n: in features (convolution: channels times kernel; embedding: size of the vocabulary).
        r: rank.
        dtype: stored dtype of both factors.
        scaling: alpha/r, or alpha/sqrt(r) with use_rslora.
        adapter_name: the name in the keys; None where there is none, as PEFT saves them.
    """

    name: str
    b_key: str
    a_key: str
    m: int
    n: int
    r: int
    dtype: torch.dtype
    scaling: float
    adapter_name: str | None


@dataclass(frozen=True)
class Inventory:
    """An adapter's tensors, sorted: modules that can be edited, the rest with the reason, and warnings."""

    modules: dict[str, LoraModule] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Pair:
    name: str
    adapter_name: str | None
    embedding: bool
    keys: dict[str, str] = field(default_factory=dict)


def take_inventory(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    *,
    adapter_name: str | None = None,
    include_conv: bool = False,
    include_embedding: bool = False,
) -> Inventory:
    """Sort an adapter's tensors by PEFT's naming rules.

    Args:
        tensors: what the weight file holds.
        config: adapter_config.json.
        adapter_name: which adapter's factors to edit, if the keys name several.
        include_conv: take LoRA on convolutions as editable.
        include_embedding: take LoRA on embeddings as editable.

    Raises:
        ValueError: several adapters and none chosen, or ranks that contradict the config.
    """
    found = Inventory()
    pairs: dict[tuple[str, str | None], _Pair] = {}
    blocked: dict[str, str] = {}
    for key in tensors:
        if match := _FACTOR.match(key) or _EMBEDDING.match(key):
            name, side, adapter = match.groups()
            pair = pairs.setdefault((name, adapter), _Pair(name, adapter, embedding=match.re is _EMBEDDING))
            pair.keys[side] = key
        elif _BIAS.search(key):
            found.carried[key] = "bias of a LoRA factor (lora_bias): it has no singular values"
        elif _MAGNITUDE.search(key):
            found.carried[key] = "DoRA magnitudes"
        elif match := _OTHER.match(key):
            found.carried[key] = "part of a LoRA variant"
            blocked[match[1]] = f"the update is not B A: the module has {match[2]} too"
        else:
            found.carried[key] = "not a LoRA factor: a bias, an embedding, or from modules_to_save"

    scalings = Scalings(config)
    tied = _tied_shapes(pairs.values(), tensors) if config.get("ensure_weight_tying") else set()
    for pair in _of_one_adapter(pairs.values(), adapter_name, found):
        reason = blocked.get(pair.name) or _why_not(pair, tensors, config, tied)
        if reason is None and pair.embedding and not include_embedding:
            reason = "LoRA on an embedding: it can be edited if asked for (include_embedding), but not probed"
        if reason is None and len(tensors[pair.keys["A"]].shape) > 2 and not include_conv:
            reason = "LoRA on a convolution: it can be edited if asked for (include_conv), but not probed"
        if reason is None:
            found.modules[pair.name] = _module(pair, tensors, scalings)
        else:
            found.carried[pair.name] = reason
    found.warnings.extend(_warnings(found, config))
    return found


def _of_one_adapter(pairs: Iterable[_Pair], adapter_name: str | None, found: Inventory) -> Iterable[_Pair]:
    by_adapter: dict[str | None, list[_Pair]] = {}
    for pair in pairs:
        by_adapter.setdefault(pair.adapter_name, []).append(pair)
    if adapter_name is None and len(by_adapter) < 2:
        return [pair for only in by_adapter.values() for pair in only]
    if adapter_name not in by_adapter:
        names = ", ".join(sorted(map(repr, by_adapter))) or "none"
        raise ValueError(f"adapter_name should be one that the weight file has: {names}; got {adapter_name!r}")
    chosen = by_adapter.pop(adapter_name)
    for other, pairs_of_other in by_adapter.items():
        for pair in pairs_of_other:
            found.carried.update((key, f"belongs to adapter {other!r}") for key in pair.keys.values())
    return chosen


def _tied_shapes(pairs: Iterable[_Pair], tensors: Mapping[str, TensorInfo]) -> set[_Shapes]:
    """Of embedding pairs and of their transposes: PEFT gives a tied lm_head the embedding's own factors."""
    shapes: set[_Shapes] = set()
    for pair in pairs:
        if pair.embedding and len(pair.keys) == 2:
            a, b = (tensors[pair.keys[side]].shape for side in "AB")
            shapes |= {(a, b), (b[::-1], a[::-1])}
    return shapes


def _why_not(
    pair: _Pair, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], tied: set[_Shapes]
) -> str | None:
    """Why the pair's singular values cannot be edited; None if they can."""
    for option, what in _VARIANTS.items():
        if config.get(option):
            return f"the update is not B A: {what} ({option})"
    for parameter in config.get("target_parameters") or ():
        owner = str(parameter).rpartition(".")[0]
        if f".{pair.name.replace('.base_layer', '')}".endswith(f".{owner}" if owner else ""):
            return f"expert parameters ({parameter}): one tensor holds the factors of all experts, mixed"
    if len(pair.keys) < 2:
        return f"lora_{'B' if 'A' in pair.keys else 'A'} is missing"
    a, b = (tensors[pair.keys[side]] for side in "AB")
    if a.dtype != b.dtype or not a.dtype.is_floating_point:
        return f"lora_A is {a.dtype} and lora_B is {b.dtype}"
    if min(len(a.shape), len(b.shape)) < 2 or 0 in a.shape + b.shape:
        return f"lora_A {a.shape} and lora_B {b.shape} are incomplete: saved from ZeRO-3 or FSDP shards?"
    if len(a.shape) != len(b.shape) or set(b.shape[2:]) - {1}:
        return f"lora_A {a.shape} and lora_B {b.shape} are not the factors of one product"
    if len(a.shape) > 2 and a.shape[0] != b.shape[1]:
        return f"a grouped convolution: lora_A {a.shape}, lora_B {b.shape}"
    if (a.shape, b.shape) in tied:
        return "tied to another module's factors (ensure_weight_tying): an edit of one would change both"
    return None


def _module(pair: _Pair, tensors: Mapping[str, TensorInfo], scalings: Scalings) -> LoraModule:
    a_key, b_key = pair.keys["A"], pair.keys["B"]
    a, b = tensors[a_key], tensors[b_key]
    r, scaling = scalings.of(pair.name)
    if a.shape[0] != r:
        raise ValueError(f"{CONFIG} says r={r} but {a_key} is {a.shape}")
    if b.shape[1] != r:
        raise ValueError(f"{CONFIG} says r={r} but {b_key} is {b.shape}")
    return LoraModule(
        name=pair.name,
        b_key=b_key,
        a_key=a_key,
        m=b.shape[0],
        n=math.prod(a.shape[1:]),
        r=r,
        dtype=a.dtype,
        scaling=scaling,
        adapter_name=pair.adapter_name,
    )


class Scalings:
    """Rank and scaling of every module in PEFT: from rank_pattern and alpha_pattern, else r and lora_alpha.

    The scaling is alpha/r, or alpha/sqrt(r) with use_rslora (Kalajdzievski, "A rank stabilization scaling
    factor for fine-tuning with LoRA", 2023).

    Args:
        config: adapter_config.json.

    Raises:
        ValueError: a pattern option is no mapping, or a pattern is not a regular expression.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._ranks, self._alphas = (Patterns(x, config.get(x)) for x in ("rank_pattern", "alpha_pattern"))

    def of(self, name: str) -> tuple[int, float]:
        """Rank and scaling of a module, named as in the weight file.

        Raises:
            ValueError: r or alpha is not a number above 0.
        """
        config, name = self._config, in_model(name)
        r = self._ranks.get(name, config.get("r", 8))
        alpha = self._alphas.get(name, config.get("lora_alpha", 8))
        if type(r) is not int or r <= 0 or not isinstance(alpha, int | float):
            raise ValueError(f"{CONFIG} gives {name} r={r!r} and lora_alpha={alpha!r}; r must be above 0, both numbers")
        return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def rank_and_scaling(name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scaling of one module, see `Scalings`."""
    return Scalings(config).of(name)


def with_ranks(
    config: Mapping[str, Any], modules: Mapping[str, LoraModule], others: Iterable[str], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """adapter_config.json for a copy in which some modules have another rank, and all their scaling.

    alpha' = scaling · r', or scaling · sqrt(r') with use_rslora. Where all modules come to the same r and alpha, these
    are the config's own; else rank_pattern and alpha_pattern name every editable module, and what was there stays
    behind them only for the others, since PEFT sorts patterns when it saves the adapter again.

    Args:
        config: adapter_config.json as it is.
        modules: name -> editable module.
        others: names of modules whose factors are carried as they are.
        ranks: name of a module -> its new rank.

    Raises:
        ValueError: PEFT makes base weights from r on loading, or no pattern can tell the modules apart.
    """
    if changes_base(config):
        raise ValueError(
            f"init_lora_weights={config['init_lora_weights']}: on loading, PEFT takes r directions out of the base "
            "weights, so r cannot change; zero the channels instead, or convert the adapter to plain LoRA"
        )
    others = list(others)
    wanted = {name: (module.r, module.scaling) for name, module in modules.items()}
    scalings = Scalings(config)
    wanted |= {name: scalings.of(name) for name in others}
    wanted |= {name: (r, wanted[name][1]) for name, r in ranks.items()}
    resized = dict(config)
    if config.get("init_lora_weights") == "orthogonal":  # for which PEFT wants even ranks, before it loads the weights
        resized["init_lora_weights"] = True
    made = {name: (r, alpha_for(r, scaling, config)) for name, (r, scaling) in wanted.items()}
    if not others and len(set(made.values())) == 1:
        [(resized["r"], resized["lora_alpha"])] = set(made.values())
        resized |= {"rank_pattern": {}, "alpha_pattern": {}}
    else:  # longer names first: a pattern matches the end of a name, too
        for option, index in (("rank_pattern", 0), ("alpha_pattern", 1)):
            own = {in_model(name): made[name][index] for name in sorted(modules, key=len, reverse=True)}
            rest = (config.get(option) or {}) if others else {}
            resized[option] = own | {key: value for key, value in rest.items() if key not in own}
    scalings = Scalings(resized)
    for name, (r, scaling) in wanted.items():
        got_r, got_scaling = scalings.of(name)
        if got_r != r or not math.isclose(got_scaling, scaling, rel_tol=1e-12):
            raise ValueError(f"no rank_pattern gives {name} rank {r} beside the other modules' patterns; got {got_r}")
    return resized


def alpha_for(r: int, scaling: float, config: Mapping[str, Any]) -> int | float:
    """The lora_alpha that gives a module of rank r this scaling, a whole number if it can be."""
    alpha = scaling * (math.sqrt(r) if config.get("use_rslora") else r)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def in_model(name: str) -> str:
    """A module's name in the base model, from that in the weight file."""
    return name.removeprefix("base_model.model.")


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether PEFT rewrites the base weights when it loads this adapter."""
    return str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE)


def _warnings(found: Inventory, config: Mapping[str, Any]) -> Iterable[str]:
    if config.get("use_dora"):
        yield "DoRA: magnitudes are kept, so an edit of singular values changes only directions of weights"
    if config.get("alora_invocation_tokens"):
        yield "aLoRA: the adapter acts only after its invocation tokens"
    if any(config.get(option) for option in ("rank_pattern", "alpha_pattern")):
        scalings = sorted({module.scaling for module in found.modules.values()})
        if len(scalings) > 1:
            low, high = scalings[0], scalings[-1]
            yield f"modules are scaled by {low:g} to {high:g}: loaders without patterns scale all alike"
    if changes_base(config):
        init = config["init_lora_weights"]
        yield f"init_lora_weights={init}: PEFT changes the base weights on loading, other loaders do not"

"""Workloads, as data: adapters of real models by shape, rank and dtype, and batches of cores. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

Shape = tuple[int, int]

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SURGERY = ("o_proj", "down_proj")  # what the method edits by default
KAPPAS = (1e1, 1e4)
# GSM8K's training problems, where they are.
VARIABLE = "SPECTRAL_FAST_GSM8K"
GSM8K = Path(os.environ.get(VARIABLE, Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"))
SAMPLES = "GSM8K" if (GSM8K / "train.jsonl").is_file() else "texts as long as GSM8K's"
EPSILON = {"bfloat16": 2**-7, "float32": 2**-23}
ROUNDINGS = 14  # tensors of a decoder layer that are rounded to the model's dtype on the way forward, and as many back
ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}


def spread(count: int) -> list[float]:
    """Condition numbers from 1e1 to 1e4, evenly in the logarithm, shuffled."""
    low, high = map(math.log10, KAPPAS)
    kappas = [10 ** (low + (high - low) * i / max(1, count - 1)) for i in range(count)]
    random.Random(0).shuffle(kappas)
    return kappas


@dataclass(frozen=True)
class Model:
    """A Llama's linear layers: name -> (out features m, in features n), the same in every layer."""

    name: str
    layers: int
    shapes: Mapping[str, Shape]

    @classmethod
    def llama(cls, name: str, layers: int, hidden: int, key_value: int, mlp: int) -> Model:
        """Shapes from the widths of the hidden state, of keys and values, and of the MLP."""
        attention = {"q_proj": (hidden, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden)}
        outputs = {"o_proj": (hidden, hidden), "down_proj": (hidden, mlp)}
        return cls(name, layers, {**attention, **outputs, "gate_proj": (mlp, hidden), "up_proj": (mlp, hidden)})


LLAMA2_7B = Model.llama("Llama-2-7B", layers=32, hidden=4096, key_value=4096, mlp=11008)
LLAMA3_70B = Model.llama("Llama-3-70B", layers=80, hidden=8192, key_value=1024, mlp=28672)
TINY = Model.llama("tiny", layers=3, hidden=128, key_value=64, mlp=320)


@dataclass(frozen=True)
class Adapter:
    """An adapter of one rank and dtype on the target modules of every layer of a model."""

    model: Model
    targets: tuple[str, ...]
    rank: int
    dtype: str

    def __str__(self) -> str:
        targets = "all linear" if self.targets == ALL_LINEAR else " + ".join(self.targets)
        return f"{self.model.name} {targets}, {len(self.shapes())} modules, r = {self.rank}, {self.dtype}"

    def shapes(self) -> dict[str, Shape]:
        """PEFT's module name -> (m, n), in the order of the layers."""
        parents = {name: "self_attn" if name in ALL_LINEAR[:4] else "mlp" for name in self.targets}
        return {
            f"base_model.model.model.layers.{layer}.{parents[name]}.{name}": self.model.shapes[name]
            for layer in range(self.model.layers)
            for name in self.targets
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(self.rank * (m + n) for m, n in self.shapes().values()) * ITEMSIZE[self.dtype]

    @property
    def largest_module(self) -> int:
        """Bytes of the factors of the largest module."""
        return max(self.rank * (m + n) for m, n in self.shapes().values()) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Cores:
    """A batch of r × r matrices in float64."""

    count: int
    rank: int
    dtype: str = "float64"

    def __str__(self) -> str:
        return f"{self.count} matrices of {self.rank} × {self.rank}, {self.dtype}"


@dataclass(frozen=True)
class Projections:
    """What a forward and backward pass leaves of each module: p and q (tokens, r), in samples of unequal length."""

    modules: int
    samples: int
    tokens: int
    rank: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.modules} modules, {self.tokens} tokens in {self.samples} samples, r = {self.rank}, {self.dtype}"


@dataclass(frozen=True)
class Elements:
    """The outputs of a LoRA branch, and a spline for them."""

    rows: int
    columns: int
    knots: int
    dtype: str

    rank: ClassVar[None] = None

    def __str__(self) -> str:
        return f"{self.rows} × {self.columns} elements, {self.knots} knots, {self.dtype}"


@dataclass(frozen=True)
class Calibration:
    """Samples through a Llama with an adapter on o_proj and down_proj, all weights random.

    Keys and values have as many heads as queries, as in Llama-2.
    """

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    vocabulary: int
    samples: int
    rank: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.samples} samples of {SAMPLES}, {self.name}, o_proj + down_proj, r = {self.rank}, {self.dtype}"

    @property
    def model(self) -> Model:
        """The shapes of its linear layers."""
        return Model.llama(self.name, self.layers, self.hidden, self.hidden, self.mlp)

    @property
    def modules(self) -> int:
        """How many modules the adapter has."""
        return self.layers * len(SURGERY)

    @property
    def rounding(self) -> float:
        """Relative error of g that rounding explains: a random walk of as many steps as tensors are rounded in turn.

        A step is half a unit in the last place, the most that a rounding errs.
        """
        return EPSILON[self.dtype] / 2 * math.sqrt(2 * ROUNDINGS * self.layers)


TINY_LLAMA = Calibration("3 layers of 128", 3, 128, 320, 4, 32000, 5, 8, "bfloat16")


@dataclass(frozen=True)
class Spectra:
    """All linear layers of a model: a decoder of random weights; or the MiniLM encoder that a package ships."""

    name: str
    dtype: str
    decoder: Calibration | None = None

    rank: ClassVar[None] = None

    def __str__(self) -> str:
        return f"all layers of {self.name}, {self.dtype}"

    @classmethod
    def loads(cls, text: str) -> Spectra:
        """From JSON."""
        fields = json.loads(text)
        if fields["decoder"] is not None:
            fields["decoder"] = Calibration(**fields["decoder"])
        return cls(**fields)

    @property
    def groups(self) -> dict[str, int]:
        """Parts that peers are timed on, and how often the model has such a part."""
        if self.decoder is None:
            return {"all": 1}
        return {"a layer": self.decoder.layers, "the head": 1}

    def group(self, layer: str) -> str | None:
        """The part that a layer is of; None for those that are like one that is timed."""
        if self.decoder is None:
            return "all"
        return "the head" if layer == "lm_head" else "a layer" if layer.startswith("model.layers.0.") else None


@dataclass(frozen=True)
class Head:
    """A micro-batch at the output embedding, and the gate that looks at it; with the model that it comes from."""

    tokens: int
    hidden: int
    vocabulary: int
    m: int
    k: int
    top_k: int
    dtype: str
    decoder: Calibration | None = None

    rank: ClassVar[None] = None

    def __str__(self) -> str:
        sizes = f"hidden {self.hidden}, vocabulary {self.vocabulary}, m = {self.m}, k = {self.k}, top {self.top_k}"
        return f"{self.tokens} tokens, {sizes}, {self.dtype}"

    @classmethod
    def of(cls, decoder: Mapping[str, Any] | None, **own: Any) -> Head:
        """From JSON's fields."""
        return cls(**own, decoder=decoder and Calibration(**decoder))


@dataclass(frozen=True)
class Stream:
    """Vectors of length m, of which k directions are kept."""

    k: int
    m: int
    vectors: int
    dtype: str = "float64"

    rank: ClassVar[None] = None

    def __str__(self) -> str:
        return f"{self.vectors} vectors into k = {self.k} directions, m = {self.m}"


ON_ADAPTERS = ("rebuild", "edit", "resize", "inspect", "weighted")
Case = Adapter | Cores | Projections | Calibration | Spectra | Elements | Head | Stream


@dataclass(frozen=True)
class Task:
    """One workload as a worker runs it.

    Attributes:
        work: "rebuild" (spectra of an adapter and both factors anew), "svd" (of cores), "sensitivity" (from
            projections), "spline" (forward and backward), "gate" (sketch and novelty), "update" (of the directions
            that a gate remembers), "edit", "resize", "inspect" (file to file),
            "weighted" (PEFT's add_weighted_adapter), "calibrate" (samples through a model), "cost of g" (a pass
            with and without), "stream", "stream or memory", "ranks", or "spectra" (of base
            weights, with exponents).
        case: what it is done to.
        peers: names in ``peers.REBUILD``, ``peers.SVD``, ``peers.SENSITIVITY``, ``peers.SPLINE`` or
            ``calibration.RUNS``.
        rounds: repeats of each implementation, at most.
        budget: seconds after which an implementation is not repeated any more; a first run that takes longer, which
            the gate checks, is its only one.
    """

    work: str
    case: Case
    peers: tuple[str, ...]
    rounds: int
    budget: float = math.inf

    def dumps(self) -> str:
        """As JSON, for the command line of a worker."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Task:
        """The inverse of ``dumps``."""
        fields = json.loads(text)
        case, fields["peers"] = fields["case"], tuple(fields["peers"])
        if fields["work"] in ON_ADAPTERS:
            shapes = {name: tuple(shape) for name, shape in case["model"]["shapes"].items()}
            case["model"], case["targets"] = Model(**case["model"] | {"shapes": shapes}), tuple(case["targets"])
        kinds: dict[str, Callable[..., Case]] = {
            **dict.fromkeys(ON_ADAPTERS, Adapter),
            "svd": Cores,
            "sensitivity": Projections,
            "gate": lambda **own: Head.of(**own),
            "update": Stream,
            "spline": Elements,
            "spectra": lambda **own: Spectra.loads(json.dumps(own)),
        }
        return cls(**fields | {"case": kinds.get(fields["work"], Calibration)(**case)})

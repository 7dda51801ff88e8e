"""What calibration costs on a machine that is not here: time and memory, by counting. Imports no torch.

``python -m benchmarks.scaling`` makes the tables of docs/scaling.md anew, from the results of the benchmark. Sizes are
in bytes, times in seconds; weights and activations have two bytes per element unless said otherwise. The samples are
those of the benchmark.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tasks
from benchmarks.cases import SURGERY, Calibration
from benchmarks.tasks import ONE, OURS, STREAMED, TWO

LOGITS = 2**24  # that the head forms at once
LOGIT_BYTES = 16  # of each: in the model's dtype twice, in float32 twice, and what lies between
KEPT = 0.1e9  # activations that the benchmark's streaming keeps instead of computing them again
WIDENED = 2**25  # elements of a weight that are converted at once where products of half precision are slow
PROCESS = 0.6e9  # resident set of a process that has imported torch, transformers and PEFT


@dataclass(frozen=True)
class Shape:
    """A Llama; linear layers only, for norms are some thousandth of it."""

    name: str
    layers: int
    hidden: int
    key_value: int
    mlp: int
    vocabulary: int
    heads: int

    @classmethod
    def of(cls, case: Calibration) -> Shape:
        """The model of a benchmark."""
        return cls(case.name, case.layers, case.hidden, case.hidden, case.mlp, case.vocabulary, case.heads)

    @property
    def attention(self) -> int:
        """Parameters of a layer's projections before and after attention."""
        return 2 * self.hidden * (self.hidden + self.key_value)

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.attention + 3 * self.hidden * self.mlp

    @property
    def head(self) -> int:
        """Parameters of the head; the embeddings have as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return self.layers * self.layer + 2 * self.head

    @property
    def factors(self) -> int:
        """Elements of an adapter's factors in a layer, per rank: o_proj and down_proj."""
        assert SURGERY == ("o_proj", "down_proj")
        return 2 * self.hidden + (self.hidden + self.mlp)


@dataclass(frozen=True)
class Work:
    """Calibration samples and the adapter's rank.

    Attributes:
        tokens: of all samples.
        labels: of all samples.
        pairs: of tokens that attend to each other: Σ t (t + 1) / 2 over samples of t tokens.
        rank: of the adapter.
    """

    tokens: int
    labels: int
    pairs: int
    rank: int

    @classmethod
    def of(cls, samples: Iterable[Any], rank: int) -> Work:
        """Counted from ``Example``s."""
        lengths = [(len(x.ids), x.n_labels) for x in samples]
        pairs = sum(t * (t + 1) // 2 for t, _ in lengths)
        return cls(sum(t for t, _ in lengths), sum(n for _, n in lengths), pairs, rank)


def flops(shape: Shape, work: Work, *, recomputed: bool) -> int:
    """Operations of a calibration.

    A product with a weight takes 2 per element and token, forward, back, and once more where a layer is run again. The
    backward pass ends below the lowest o_proj. Attention multiplies two matrices forward and five back. The head
    takes labelled tokens only, forward and back.
    """
    sweeps = 3 if recomputed else 2
    linear = 2 * work.tokens * (sweeps * shape.layers * shape.layer - shape.attention)
    branch = 2 * work.tokens * sweeps * shape.layers * shape.factors * work.rank
    attention = (4 * (sweeps - 1) + 10) * work.pairs * shape.hidden * shape.layers - 10 * work.pairs * shape.hidden
    return linear + branch + attention + 4 * work.labels * shape.head


def saved(shape: Shape, tokens: int, rank: int, itemsize: int = 2, attention: int | None = None) -> int:
    """What autograd keeps of a layer.

    Both norms' inputs in float32; q, k, v and attention's output, and its log sums in float32; gate, its SiLU and up;
    and p of both modules, which is all that g adds.

    Args:
        shape: the model.
        tokens: that go through it together.
        rank: of the adapter.
        itemsize: of the model's dtype.
        attention: of the dtype in which attention is computed; the model's if left out.
    """
    elsewhere = 2 * 4 * shape.hidden + (3 * shape.mlp + 2 * rank) * itemsize
    return tokens * elsewhere + _of_attention(shape, tokens, attention or itemsize)


def _of_attention(shape: Shape, tokens: int, itemsize: int) -> int:
    return tokens * (2 * (shape.hidden + shape.key_value) * itemsize + 4 * shape.heads)


def kept(shape: Shape, tokens: int, rank: int, itemsize: int = 2, attention: int | None = None) -> int:
    """What autograd keeps of the whole model, see `saved`.

    The graph begins with the lowest o_proj, so that of the layer below nothing is kept; the last norm comes on top.
    """
    lowest = 4 * shape.hidden * tokens + _of_attention(shape, tokens, attention or itemsize)
    return shape.layers * saved(shape, tokens, rank, itemsize, attention) - lowest + 4 * shape.hidden * tokens


def pack(shape: Shape, work: Work, layers: int, itemsize: int = 2) -> int:
    """Tokens that go through a layer together: graphs of 4 GiB in that many layers, 512 at least, 4096 at most."""
    graph = layers * (12 * shape.hidden + 3 * shape.mlp) * itemsize
    return min(work.tokens, max(512, min(4096, 2**32 // graph)))


def memory(shape: Shape, work: Work, itemsize: int = 2) -> float:
    """Of a model in memory: its weights, one pack's activations in all layers, and logits."""
    activations = kept(shape, pack(shape, work, shape.layers, itemsize), work.rank, itemsize)
    return shape.parameters * itemsize + activations + LOGITS * LOGIT_BYTES


def streamed_memory(shape: Shape, work: Work, itemsize: int = 2) -> float:
    """Of a streamed model: three parts of the weights, and one pack's activations in one layer, or logits.

    The parts at the turning point: the last layer, which stays, the head, and the layer before, which is read already.
    """
    activations = saved(shape, pack(shape, work, 1, itemsize), work.rank, itemsize)
    return (2 * shape.layer + shape.head) * itemsize + max(activations, LOGITS * LOGIT_BYTES)


def inputs(shape: Shape, work: Work, itemsize: int = 2) -> int:
    """Of all layer inputs and the head's, which are on disk."""
    return (shape.layers + 1) * work.tokens * shape.hidden * itemsize


def weights_read(shape: Shape, itemsize: int = 2) -> int:
    """Of the checkpoint: every layer but the last twice, embeddings, last layer and head once."""
    return ((2 * shape.layers - 1) * shape.layer + 2 * shape.head) * itemsize


@dataclass(frozen=True)
class Machine:
    """A place to calibrate.

    Attributes:
        memory: that weights and activations can have.
        peak: operations per second of bfloat16 products, as the maker says.
        bandwidth: bytes per second of that memory.
        host: bytes per second at which weights come from the host's page cache.
        disk: bytes per second at which they come from a disk.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    host: float
    disk: float


def seconds(shape: Shape, work: Work, machine: Machine, efficiency: float) -> float:
    """How long a model in memory takes: its operations, or its weights, which every pack needs twice."""
    packs = -(-work.tokens // pack(shape, work, shape.layers))
    compute = flops(shape, work, recomputed=False) / (machine.peak * efficiency)
    return max(compute, 2 * packs * 2 * shape.parameters / machine.bandwidth)


def streamed_seconds(shape: Shape, work: Work, machine: Machine, efficiency: float, source: float) -> float:
    """How long streaming takes: the first layer's reading, then reading or operations, whichever is more.

    Args:
        shape: the model.
        work: the samples.
        machine: where.
        efficiency: share of the peak that its products reach.
        source: bytes per second of weights.
    """
    compute = flops(shape, work, recomputed=True) / (machine.peak * efficiency)
    return 2 * shape.layer / source + max(compute, weights_read(shape) / source)


# Widths from the models' config.json.
MODELS = (
    Shape("8B", 32, 4096, 1024, 14336, 128256, 32),
    Shape("70B", 80, 8192, 1024, 28672, 128256, 64),
    Shape("405B", 126, 16384, 1024, 53248, 128256, 128),
)
NVME = 7.45e9
MACHINES = (
    Machine("H100 SXM, 80 GB", 80e9, 989.4e12, 3.35e12, 64e9, NVME),
    Machine("RTX 4090, 24 GB", 24e9, 165.2e12, 1.008e12, 32e9, NVME),
    Machine("2 × Xeon 8480+, 1 TB", 1e12, 2 * 56 * 1024 * 2.0e9, 614.4e9, 614.4e9, NVME),
)
EFFICIENCY = 0.4  # of these machines; see the page
# The benchmark's samples: 32 problems of GSM8K.
SAMPLES = Work(tokens=6912, labels=4386, pairs=839170, rank=64)


def predictions() -> str:
    """Time and memory on machines that are not here, as Markdown."""
    lines = [
        "| model | machine | in memory: memory | time | streamed: memory | on disk | weights read "
        "| time, from page cache | time, from NVMe |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in MODELS:
        for machine in MACHINES:
            fits, streams = (f(shape, SAMPLES) <= machine.memory for f in (memory, streamed_memory))
            time = _time(seconds(shape, SAMPLES, machine, EFFICIENCY)) if fits else "does not fit"
            streamed = [
                _time(streamed_seconds(shape, SAMPLES, machine, EFFICIENCY, source)) if streams else "does not fit"
                for source in (machine.host, machine.disk)
            ]
            cells = [
                shape.name,
                machine.name,
                _size(memory(shape, SAMPLES)),
                time,
                _size(streamed_memory(shape, SAMPLES)),
                _size(inputs(shape, SAMPLES)),
                _size(weights_read(shape)),
                *streamed,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes < 999e9 else f"{nbytes / 1e12:.3g} TB"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2g} s"
        if seconds < 99
        else f"{seconds / 60:.2g} min"
        if seconds < 5940
        else f"{seconds / 3600:.2g} h"
    )


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-avx512-2-cores-calibration.csv"


def measured(path: Path) -> str:
    """What the formulas say of the benchmark's own runs, as Markdown.

    One number is taken from a run, the share of the peak that products reach in memory; all else is predicted.
    """
    with path.open(encoding="utf-8") as file:
        rows = {(row["work"], row["implementation"]): row for row in csv.DictReader(file)}
    ours, one, two, big = (
        rows[key] for key in (("calibrate", OURS), ("ranks", ONE), ("ranks", TWO), ("stream", STREAMED))
    )
    share = efficiency(ours)
    case = tasks.STREAM.case
    assert isinstance(case, Calibration)
    shape, work = Shape.of(case), Work(int(big["tokens"]), 0, 0, case.rank)
    # This machine multiplies in float32: part of a weight, and what it is multiplied with and gives, are widened.
    widened = 4 * (WIDENED + 2 * work.tokens * shape.mlp)
    peak_memory = PROCESS + KEPT + widened + streamed_memory(shape, work)
    streamed, memory_ = (rows["stream or memory", name] for name in (OURS, tasks.IN_MEMORY))
    lines = [
        "| run | quantity | predicted | measured |",
        "|---|---|---|---|",
        f"| in memory, 8 layers, bfloat16 | share of the peak, {float(ours['peak_flops_s']) / 1e9:.0f} Gflop/s "
        f"| taken from here | {share:.2f} |",
        f"| in memory, 8 layers, float32 | time | {_time(_predicted(memory_, share))} | {_median(memory_)} |",
        f"| streamed, 8 layers, float32 | time | {_time(_predicted(streamed, share))} | {_median(streamed)} |",
        f"| 1 rank, one thread | time | {_time(_predicted(one, share))} | {_median(one)} |",
        f"| 2 ranks, one thread each | time | {_time(_predicted(two, share) / 2)} | {_median(two)} |",
        f"| streamed, Llama-2-7B, 8 samples | time | {_time(_predicted(big, share))} | {_median(big)} |",
        f"| | peak memory | {_size(peak_memory)} | {_size(int(big['peak_bytes']))} |",
        f"| | weights read | {_size(weights_read(shape))} | {_size(int(big['read_bytes']))} |",
    ]
    return "\n".join(lines)


def efficiency(row: dict[str, str]) -> float:
    """The share of the peak that a run reached."""
    return int(row["flops"]) / float(row["median_s"]) / float(row["peak_flops_s"])


def _predicted(row: dict[str, str], share: float) -> float:
    return int(row["flops"]) / (float(row["peak_flops_s"]) * share)


def _median(row: dict[str, str]) -> str:
    return _time(float(row["median_s"]))


def page(text: str) -> str:
    """The page with its tables made anew, each of which lies between two comments with its name."""
    for name, table in (("measured", measured(RESULTS)), ("predicted", predictions())):
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = head + begin + table + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

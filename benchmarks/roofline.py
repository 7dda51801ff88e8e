"""What the GPU kernels move and compute beside the least possible, and the time that public peaks allow at best.

``python -m benchmarks.roofline`` (``make roofline``) needs no GPU: the launchers run on memory that nothing touches,
and their launches are counted by ``traffic.py`` instead of being run. Every time is a bound, none is measured. The
exit status is 1 where a kernel moves more than it may, see ``LIMIT``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import torch

from benchmarks import traffic
from benchmarks.cases import ALL_LINEAR, LLAMA2_7B, LLAMA3_70B, Adapter, Head, Model, Shape
from benchmarks.codegen import uncompiled
from benchmarks.tasks import LOOK
from benchmarks.timing import ROOT
from benchmarks.traffic import Launch, Traffic
from spectral_fast.bench import least
from spectral_fast.bench.cards import CARDS
from spectral_fast.bench.least import Work
from spectral_fast.kernels.head_sketch import Hashes, head_sketch
from spectral_fast.kernels.recompose import Product, recompose
from spectral_fast.kernels.sensitivity import Module, grouped_products, segment_products
from spectral_fast.kernels.spectral_linear import spectral_linear
from spectral_fast.kernels.spline import spline

CSV = ROOT / "benchmarks/results/roofline.csv"
SAMPLES, TOKENS = 32, 200  # of the calibration
RANKS = (16, 64)
ITEMSIZE = 2  # bfloat16
LIMIT = 1.1  # times the least bytes, for the kernels that are traffic and nothing else
SPLINES = ("spline", "spline added to base", "spline backward")
LIMITED = ("spectral_linear forward", "spectral_linear backward and g", "recompose", *SPLINES)
KNOTS = 5  # of a spline
SENSITIVITY_LIMIT = 0.01  # of the branch's own traffic, for g


@dataclass(frozen=True)
class Row:
    """A kernel on a workload.

    Attributes:
        kernel: what is counted.
        workload: in words.
        traffic: of all its launches.
        flops: of its matrix products, padding included.
        least: what cannot be avoided.
        worst: the largest ratio of bytes to the least among the workload's parts.
    """

    kernel: str
    workload: str
    traffic: Traffic
    flops: int
    least: Work
    worst: float

    @property
    def ratio(self) -> float:
        """Bytes over the least bytes."""
        return self.traffic.memory / self.least.nbytes

    def cells(self) -> dict[str, Any]:
        """One row of the CSV; bounds in ms."""
        return {
            "kernel": self.kernel,
            "workload": self.workload,
            "bytes": self.traffic.memory,
            "least_bytes": self.least.nbytes,
            "ratio": f"{self.ratio:.3f}",
            "worst_ratio": f"{self.worst:.3f}",
            "cached_bytes": self.traffic.again,
            "flops": self.flops,
            "least_flops": sum(self.least.flops.values()),
            **{f"{card.name}_bound_ms": f"{card.bound(*self.least) * 1e3:.4f}" for card in CARDS},
        }


Part = tuple[list[Launch], Work]


def row(kernel: str, workload: str, parts: Sequence[Part]) -> Row:
    """The sum of some parts, each with its launches and its least work."""
    total, flops, floor, worst = Traffic(), 0, Work(0, {}), 0.0
    for launches, work in parts:
        if missing := uncompiled(launches, "sm_90"):
            raise SystemExit(f"{kernel}, {workload}: launches what is not shipped: {'; '.join(missing)}")
        moved = sum((launch.traffic() for launch in launches), Traffic())
        total, flops = total + moved, flops + sum(launch.flops() for launch in launches)
        worst = max(worst, moved.memory / work.nbytes)
        units = {unit: floor.flops.get(unit, 0) + count for unit, count in work.flops.items()}
        floor = Work(floor.nbytes + work.nbytes, units)
    return Row(kernel, workload, total, flops, floor, worst)


def launched(run: Callable[[], object]) -> list[Launch]:
    """What a call would launch on a GPU."""
    with traffic.recorded() as launches:
        run()
    return launches


def empty(*shape: int) -> torch.Tensor:
    """Memory that is not touched: addresses are all that launches are made of."""
    return torch.empty(*shape, dtype=torch.bfloat16)


def branch(shape: Shape, r: int) -> tuple[list[Launch], list[Launch]]:
    """Launches of a module's forward and backward pass over all samples, with g per sample."""
    (m, n), tokens = shape, SAMPLES * TOKENS
    starts = torch.arange(0, tokens + 1, TOKENS)
    x, y = empty(tokens, n).requires_grad_(), empty(tokens, m)
    s = torch.ones(SAMPLES, r, requires_grad=True)
    with traffic.recorded() as forward:
        out = spectral_linear(x, y, empty(m, r), s, empty(r, n), 2.0, starts)
    with traffic.recorded() as backward:
        out.backward(empty(tokens, m))
    return forward, backward


def sensitivity_share(forward: Sequence[Launch], backward: Sequence[Launch]) -> float:
    """Bytes that only g needs, over the rest: p, written and read; the sums of every block, and adding them."""
    [kept] = (launch["p_p"].nbytes for launch in forward if launch.kernel == "expand_kernel")
    [sums] = (launch["p_sums"].nbytes for launch in backward if launch.kernel == "expand_kernel")
    added = sum(launch.traffic().memory for launch in backward if launch.kernel == "sum_kernel")
    own = 2 * kept + sums + added
    return own / (sum(launch.traffic().memory for launch in (*forward, *backward)) - own)


def rows(model: Model, r: int) -> Iterator[Row]:
    """All kernels on one model's adapter; the projections of calibration over one of its layers."""
    adapter, layer = Adapter(model, ALL_LINEAR, r, "bfloat16"), list(model.shapes.values())
    tokens, modules = SAMPLES * TOKENS, list(adapter.shapes().values())
    calibration, whole = (
        f"{model.name}, a layer, {tokens} tokens, r = {r}",
        f"{model.name}, {len(modules)} modules, r = {r}",
    )

    passes = [branch(shape, r) for shape in layer]
    floors = [[part(shape, tokens, r, ITEMSIZE) for part in (least.forward, least.backward)] for shape in layer]
    for i, kernel in enumerate(LIMITED[:2]):
        parts = [(launches[i], floor[i]) for launches, floor in zip(passes, floors, strict=True)]
        yield row(kernel, calibration, parts)
    share = max(starmap(sensitivity_share, passes))
    if share > SENSITIVITY_LIMIT:
        raise SystemExit(f"{calibration}: g costs {share:.2%} of the branch's own traffic, at most 1 % is allowed")
    print(f"{calibration}: g costs {share:.2%} of the branch's own traffic, at most", file=sys.stderr)

    starts = torch.arange(0, tokens + 1, TOKENS)
    launches = launched(lambda: segment_products(empty(tokens, r), empty(tokens, r), starts))
    yield row("segment_products", calibration, [(launches, least.products(tokens, SAMPLES, r, ITEMSIZE))])
    seen = [Module(empty(tokens, n), empty(tokens, m), empty(m, r), empty(r, n)) for m, n in layer]
    launches = launched(lambda: grouped_products(seen, starts))
    yield row("grouped_products", calibration, [(launches, least.grouped(layer, tokens, SAMPLES, r, ITEMSIZE))])

    yield row("lowrank_svd, Gram matrices", whole, [(_grams(modules, r), least.spectra(modules, r, ITEMSIZE))])
    t, scale = torch.ones(r, r, dtype=torch.float64), torch.ones(r, dtype=torch.float64)
    factors = [((empty(m, r), empty(m, r)), (empty(r, n), empty(r, n))) for m, n in modules]
    products = [Product(x, t, scale, out, bool(i), False) for sides in factors for i, (x, out) in enumerate(sides)]
    yield row("recompose", whole, [(launched(lambda: recompose(products)), least.recomposed(modules, r, ITEMSIZE))])


def spline_rows(model: Model) -> Iterator[Row]:
    """The spline on the outputs of one layer of a model."""
    widths, tokens = [m for m, _ in model.shapes.values()], SAMPLES * TOKENS
    workload = f"{model.name}, a layer, {tokens} tokens, {KNOTS} knots"
    values, s_in, s_out = (torch.ones(count, requires_grad=True) for count in (KNOTS, 1, 1))
    found: list[list[Part]] = [[], [], []]
    for width in widths:
        x, elements = empty(tokens, width).requires_grad_(), tokens * width
        for i, base in enumerate((None, empty(tokens, width))):
            with traffic.recorded() as forward:
                y = spline(x, values, s_in, s_out, base=base)
            found[i].append((forward, least.spline(elements, ITEMSIZE, base is not None)))
        with traffic.recorded() as backward:
            y.backward(empty(tokens, width))
        found[2].append((backward, least.spline_backward(elements, ITEMSIZE)))
    for kernel, parts in zip(SPLINES, found, strict=True):
        yield row(kernel, workload, parts)


def _grams(modules: Sequence[Shape], r: int) -> list[Launch]:
    from spectral_fast.kernels.lowrank_svd.gpu import filled_rank, grams

    return launched(lambda: grams([empty(m, r) for m, _ in modules], [empty(r, n) for _, n in modules], filled_rank(r)))


def look(case: Head) -> Row:
    """The sketch of a micro-batch at the output embedding."""
    labels, hashes = torch.ones(case.tokens, dtype=torch.int64), Hashes.draw(case.hidden, case.vocabulary, case.m, 0)
    hidden, logits = empty(case.tokens, case.hidden), empty(case.tokens, case.vocabulary)
    launches = launched(lambda: head_sketch(hidden, logits, labels, hashes, case.top_k))
    work = Work(hidden.nbytes + logits.nbytes, {"float32": 2 * case.tokens * (case.top_k + 1) * case.m})
    return row(
        "head_sketch",
        f"{case.tokens} tokens, {case.hidden}, {case.vocabulary} ids, top {case.top_k}",
        [(launches, work)],
    )


def table(found: Sequence[Row]) -> str:
    """For people: MB, and ms by the cards' peaks."""
    lines = [
        f"{'kernel':<32}{'workload':<46}{'MB':>9}{'least':>9}{'ratio':>7}{'worst':>7}{'again':>9}{'Gflop':>9}{'least':>9}"
        + "".join(f"{card.name:>9}" for card in CARDS)
    ]
    for x in found:
        figures = (x.traffic.memory / 1e6, x.least.nbytes / 1e6)
        lines.append(
            f"{x.kernel:<32}{x.workload:<46}{figures[0]:>9.1f}{figures[1]:>9.1f}{x.ratio:>7.3f}{x.worst:>7.3f}"
            f"{x.traffic.again / 1e6:>9.1f}{x.flops / 1e9:>9.1f}{sum(x.least.flops.values()) / 1e9:>9.1f}"
            + "".join(f"{card.bound(*x.least) * 1e3:>9.4f}" for card in CARDS)
        )
    return "\n".join(lines)


def failures(found: Sequence[Row]) -> list[str]:
    """What moves more than it may."""
    return [
        f"{x.kernel}, {x.workload}: {x.worst:.3f} times the least bytes, at most {LIMIT} are allowed"
        for x in found
        if x.kernel in LIMITED and x.worst > LIMIT
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Count everything; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--out", type=Path, default=CSV, help="(default: results/roofline.csv)")
    args = parser.parse_args(argv)
    assert isinstance(LOOK.case, Head)
    models = (LLAMA2_7B, LLAMA3_70B)
    found = [row for model in models for r in RANKS for row in rows(model, r)]
    found += [row for model in models for row in spline_rows(model)]
    found += [look(LOOK.case)]
    print(table(found))
    print(
        "\nMB to and from memory, each operand once per kernel; again: loaded once more, out of the L2 cache: tiles of"
    )
    print("small operands (U, V, transforms) by every block of tokens or rows. Configurations are those of an H100.")
    print("Times are bounds in ms, by the larger of bytes over bandwidth and flops over peak; none is measured:")
    for card in CARDS:
        rates = f"{card.bandwidth / 1e12:.3g} TB/s, {card.bfloat16 / 1e12:.4g} Tflop/s in bfloat16"
        print(
            f"  {card.name:<8}{rates}, {card.float32 / 1e12:.4g} in float32, {card.float64 / 1e12:.4g} in float64"
            f" ({card.source})"
        )
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0].cells()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(x.cells() for x in found)
    for line in failures(found):
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failures(found) else 0


if __name__ == "__main__":
    sys.exit(main())

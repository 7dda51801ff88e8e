"""Resizing and inspecting an adapter, file to file, beside what one would write with torch."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import adapter_file
from benchmarks.cases import TINY, Adapter
from benchmarks.tasks import DENSE_SVD, OURS, QR_SVD, SVD_LOWRANK, VALUES_ALONE
from benchmarks.workloads import Candidate, Workload
from spectral_fast.adapter import Adapter as Opened
from spectral_fast.bench.gate import WrongResult
from spectral_fast.kernels.lowrank_svd import reference
from spectral_fast.toolbox.inspection import inspect_adapter
from spectral_fast.toolbox.resize import ResizeOptions, resize_adapter

Decomposed = tuple[Tensor, Tensor, Tensor]  # u, s and v
CHECKED = 6  # modules, spread over the adapter
WEIGHTS = "adapter_model.safetensors"
# A random range of exactly k columns now and then misses one of the k directions; torch's documentation wants q
# "slightly overestimated": with five more (Halko et al. 2011, section 4.2) and two power iterations none is missed.
OVERSAMPLING = 5
# How much farther than the nearest matrix of rank k an implementation may be; rounding to bfloat16 comes besides.
WORSE, ROUNDING = {SVD_LOWRANK: 1.1}, 2**-7


def resize(case: Adapter, names: Sequence[str]) -> Workload:
    """An adapter of a quarter of the rank, in a new file.

    Floor: the factors are read and the new ones written; half of a Gram matrix takes l r² operations of a factor of
    length l, its product with an r × k matrix 2 l r k.
    """
    k = case.rank // 4
    shapes = case.shapes()
    folder = _folder(case)
    smallest = min(shapes, key=lambda name: shapes[name][0] * shapes[name][1])
    dense_share = (
        shapes[smallest][0]
        * shapes[smallest][1]
        * min(shapes[smallest])
        / sum(m * n * min(m, n) for m, n in shapes.values())
    )
    runs: dict[str, tuple[Callable[[Path, list[str] | None], Any], list[str] | None, float]] = {
        OURS: (partial(_ours, k=k), None, 1.0),
        SVD_LOWRANK: (partial(_by_torch, decompose=partial(_randomized, k=k)), None, 1.0),
        DENSE_SVD: (partial(_by_torch, decompose=partial(_dense, k=k)), [smallest], dense_share),
    }
    small = _folder(replace(case, model=TINY, rank=8))

    def candidates() -> Iterator[Candidate]:
        for name in names:
            run, some, share = runs[name]
            check = partial(_check_resized, name, case, k, folder, some)
            yield Candidate(name, partial(run, small, None), partial(run, folder, some), check, share)

    lengths = sum(m + n for m, n in shapes.values())
    written = lengths * k * (case.nbytes // (lengths * case.rank))
    flops = lengths * (case.rank**2 + 2 * case.rank * k)
    return Workload(candidates(), _copied(), case.nbytes + written, flops, _dtypes(case))


def inspect(case: Adapter, names: Sequence[str]) -> Workload:
    """The singular values of all modules, from the file. Floor: factors are read, half their Gram matrices formed."""
    folder, small = _folder(case), _folder(replace(case, model=TINY, rank=8))
    runs = {OURS: _inspect_ours, QR_SVD: partial(_inspect_per_module, whole=True), VALUES_ALONE: _inspect_per_module}

    def candidates() -> Iterator[Candidate]:
        for name in names:
            run, check = runs[name], partial(_check_inspected, name, case, folder)
            yield Candidate(name, partial(run, small), partial(run, folder), check)

    flops = sum(m + n for m, n in case.shapes().values()) * case.rank**2
    return Workload(candidates(), _copied(), case.nbytes, flops, _dtypes(case))


def _folder(case: Adapter) -> Path:
    """The adapter in a folder that goes with the process."""
    folder = Path(mkdtemp())
    atexit.register(rmtree, folder)
    adapter_file.make(case, folder)
    return folder


def _copied() -> list[tuple[Tensor, Tensor]]:
    x = torch.ones(2**26)
    return [(torch.empty_like(x), x)]


def _dtypes(case: Adapter) -> tuple[torch.dtype, ...]:
    return getattr(torch, case.dtype), torch.float32


def _ours(folder: Path, _: list[str] | None, k: int) -> Path:
    resize_adapter(Opened.open(folder / "adapter"), ResizeOptions(rank=k), folder / "ours", overwrite=True)
    return folder / "ours"


def _by_torch(
    folder: Path, some: list[str] | None, decompose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> Path:
    """The dense ΔW of each module, decomposed, and all factors saved."""
    tensors = load_file(folder / "adapter" / WEIGHTS)
    made = {}
    for name in some or [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]:
        b, a = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        u, s, v = decompose(b.float() @ a.float())
        made[f"{name}.lora_B.weight"] = (u * s.sqrt()).to(b.dtype).contiguous()
        made[f"{name}.lora_A.weight"] = (v * s.sqrt()).mT.to(a.dtype).contiguous()
    (folder / "torch").mkdir(exist_ok=True)
    save_file(made, folder / "torch" / WEIGHTS)
    return folder / "torch"


def _randomized(w: Tensor, k: int) -> Decomposed:
    u, s, v = torch.svd_lowrank(w, q=k + OVERSAMPLING)
    return u[:, :k], s[:k], v[:, :k]


def _dense(w: Tensor, k: int) -> Decomposed:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :k], s[:k], vh[:k].mT


def _inspect_ours(folder: Path) -> dict[str, Tensor]:
    adapter = Opened.open(folder / "adapter")
    return {name: torch.from_numpy(x.s) / adapter.modules[name].scaling for name, x in inspect_adapter(adapter).items()}


def _inspect_per_module(folder: Path, whole: bool = False) -> dict[str, Tensor]:
    """In float32, per module, two QRs and the SVD of the core; or only as much of them as the values take."""
    mode = "reduced" if whole else "r"
    tensors = load_file(folder / "adapter" / WEIGHTS)
    found = {}
    for name in [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]:
        _, r_b = torch.linalg.qr(tensors[f"{name}.lora_B.weight"].float(), mode=mode)
        _, r_a = torch.linalg.qr(tensors[f"{name}.lora_A.weight"].float().mT, mode=mode)
        found[name] = torch.linalg.svd(r_b @ r_a.mT).S if whole else torch.linalg.svdvals(r_b @ r_a.mT)
    return found


def _sample(case: Adapter) -> list[str]:
    """Names of some modules."""
    names = list(case.shapes())
    return [names[i] for i in sorted({round(j * (len(names) - 1) / (CHECKED - 1)) for j in range(CHECKED)})]


def _check_resized(name: str, case: Adapter, k: int, folder: Path, some: list[str] | None, made: Path) -> None:
    """That each product is about as near to ΔW as one of rank k can be: ‖B A − B' A'‖ by QR in float64."""
    old = load_file(folder / "adapter" / WEIGHTS)
    new = load_file(made / WEIGHTS)
    for module in some or _sample(case):
        (b, a), (d, c) = (
            (x[f"{module}.lora_B.weight"].double(), x[f"{module}.lora_A.weight"].double()) for x in (old, new)
        )
        s = reference.factor(b, a, module).s
        r_b = torch.linalg.qr(torch.cat([b, -d], 1), mode="r").R
        r_a = torch.linalg.qr(torch.cat([a, c]).mT, mode="r").R
        error, nearest = (r_b @ r_a.mT).norm(), s[k:].norm()
        if d.shape[1] != k or not error <= WORSE.get(name, 1.0) * nearest + ROUNDING * s.norm():
            raise WrongResult(f"{name}, {module}: off by {error:.3g}, the nearest of rank {k} is by {nearest:.3g}")


def _check_inspected(name: str, case: Adapter, folder: Path, found: dict[str, Tensor]) -> None:
    if found.keys() != case.shapes().keys():
        raise WrongResult(f"{name}: {len(found)} modules")
    adapter = Opened.open(folder / "adapter")
    for module in _sample(case):
        s = reference.factor(*adapter.read(adapter.modules[module]), module).s
        off = (found[module].double() - s).abs().max() / s[0]
        if not off <= 30 * case.rank * torch.finfo(torch.float32).eps:
            raise WrongResult(f"{name}, {module}: singular values are off by {off:.3g} of the largest")

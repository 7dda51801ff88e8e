"""The public function: checks the factors once and hands them to the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_fast.backends import Backend, pick, register
from spectral_fast.kernels import gpu
from spectral_fast.kernels.lowrank_svd import cpu, gram, reference
from spectral_fast.kernels.lowrank_svd.reference import Factored

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

MAX_GPU_RANK = 512  # of `batched_svd` on a GPU


def _gpu_refuses(bs: Sequence[Tensor] = (), as_: Sequence[Tensor] = (), names: Sequence[str] = ()) -> str | None:  # noqa: ARG001
    largest = max((b.shape[1] for b in bs), default=0)
    if largest > MAX_GPU_RANK:
        return f"a module has rank {largest}; the SVD of cores is made for up to {MAX_GPU_RANK}"
    return gpu.refuses((*bs, *as_))


def _gpu(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str]) -> list[Factored]:
    from spectral_fast.kernels.lowrank_svd.gpu import solve  # importing triton takes its time

    return gram.lowrank_svd(bs, as_, names, solve, reference.factor)


register(
    "lowrank_svd",
    Backend("cpu", cpu.refuses, cpu.lowrank_svd),
    Backend("gpu", _gpu_refuses, _gpu),
    Backend("reference", lambda *_: None, reference.lowrank_svd),
)


def lowrank_svd(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str] | None = None) -> list[Factored]:
    """Compact SVDs B A = U diag(s) Vᵀ of all modules of an adapter at once; the factors are detached.

    Args:
        bs: of each module B (m, r): bfloat16, float16, float32 or float64; shapes and ranks may differ.
        as_: of each module A (r, n), on the device of its B.
        names: what errors call the modules; "module 0", "module 1", ... if left out.

    Returns:
        one ``Factored`` per module, in order. The test ratios ‖B A − U diag(s) Vᵀ‖_F / (‖B‖_F ‖A‖_F r ε) and
        ‖UᵀU − I‖_F / (r ε), ε of float32 (of float64 if a factor is), are at most 30, and s is within
        30 r ε s_max; ranks that carry nothing give s = 0, and U and V are orthonormal all the same, but for
        the zero vectors of directions beyond min(m, n).

    Raises:
        TypeError: a factor is no tensor, or of another dtype.
        ValueError: the lists differ in length, two factors do not fit, or one holds a NaN or an infinity.
        RuntimeError: the backend that ``SPECTRAL_FAST_BACKEND`` forces refuses, or ``SPECTRAL_FAST_ISA`` names an
            instruction set that this processor lacks.
    """
    bs, as_, names = _checked(bs, as_, names)
    results: list[Factored] = pick("lowrank_svd", bs, as_, names).call(bs, as_, names)
    return results


def singular_values(bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str] | None = None) -> list[Tensor]:
    """Singular values of all modules' B A at once, (r,) float64 each, as `lowrank_svd` gives them, for less work.

    Args:
        bs: as there.
        as_: as there.
        names: as there.

    Raises:
        As there.
    """
    bs, as_, names = _checked(bs, as_, names)
    backend = pick("lowrank_svd", bs, as_, names)
    if backend.name == "cpu":
        return cpu.singular_values(bs, as_, names)
    return [x.s for x in backend.call(bs, as_, names)]


def _checked(
    bs: Sequence[Tensor], as_: Sequence[Tensor], names: Sequence[str] | None
) -> tuple[list[Tensor], list[Tensor], Sequence[str]]:
    names = [f"module {i}" for i in range(len(bs))] if names is None else names
    if not len(bs) == len(as_) == len(names):
        raise ValueError(f"one B, one A and one name per module; got {len(bs)}, {len(as_)} and {len(names)}")
    for b, a, name in zip(bs, as_, names, strict=True):
        _check_factor(b, "B", name)
        _check_factor(a, "A", name)
        if b.shape[1] != a.shape[0]:
            raise ValueError(f"{name}: B (m, r) and A (r, n) share r; got B {tuple(b.shape)} and A {tuple(a.shape)}")
        if b.device != a.device:
            raise ValueError(f"{name}: B is on {b.device} and A on {a.device}; move one to the other")
    return [b.detach() for b in bs], [a.detach() for a in as_], names


def _check_factor(x: Tensor, factor: str, name: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: {factor} must be a tensor of {', '.join(map(str, DTYPES))}; got {got}")
    if x.ndim != 2:
        raise ValueError(f"{name}: {factor} must be a matrix, got shape {tuple(x.shape)}")

"""The public function, its backends, and the registered op between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spectral_fast.backends import Backend, define, pick, register
from spectral_fast.kernels import gpu, native


def segment_products(p: Tensor, q: Tensor, starts: Tensor | None = None) -> Tensor:
    """Sums of p ⊙ q over the tokens of each segment: out[t] = Σ p[n] ⊙ q[n] for starts[t] ≤ n < starts[t + 1].

    Has no gradient: p and q are detached.

    Args:
        p: projections of the inputs, (tokens, r): bfloat16, float16, float32 or float64.
        q: projections of the outputs' gradients, same shape, dtype and device.
        starts: first token of each segment and, last, the number of tokens: (segments + 1,) int64, on the CPU,
            starting at 0 and not descending. None for one segment of all tokens.

    Returns:
        (segments, r) float32, or float64 if p is.

    Raises:
        ValueError: shapes or starts do not fit.
        TypeError: dtypes do not fit.
    """
    if p.device != q.device or (starts is not None and starts.device.type != "cpu"):
        where = None if starts is None else starts.device
        raise ValueError(f"p and q must be on one device, and starts on the CPU; got {p.device}, {q.device}, {where}")
    out: Tensor = _op(p.detach(), q.detach(), torch.tensor([0, len(p)]) if starts is None else starts)
    return out


def _segment_products(p: Tensor, q: Tensor, starts: Tensor) -> Tensor:
    if p.ndim != 2 or p.shape != q.shape:
        raise ValueError(f"p and q must be matrices (tokens, r) of one shape, got {tuple(p.shape)}, {tuple(q.shape)}")
    if p.dtype != q.dtype or p.dtype not in native.CODES:
        raise TypeError(f"p and q must share one of {', '.join(map(str, native.CODES))}; got {p.dtype}, {q.dtype}")
    check_starts(starts, len(p))
    result: Tensor = pick("sensitivity", p, q, starts).call(p, q, starts)
    return result


def check_starts(starts: Tensor, tokens: int) -> None:
    """Raises unless these are the bounds of segments that cover all tokens."""
    if starts.dtype != torch.int64 or starts.ndim != 1 or starts.device.type != "cpu":
        raise TypeError(
            f"starts must be a vector of int64 on the CPU, got {starts.dtype} {tuple(starts.shape)} on {starts.device}"
        )
    if len(starts) < 1 or starts[0] != 0 or starts[-1] != tokens or bool((starts.diff() < 0).any()):
        raise ValueError(f"starts must go from 0 to {tokens}, the number of tokens, without descending; got {starts}")


def reference(p: Tensor, q: Tensor, starts: Tensor) -> Tensor:
    """The definition."""
    wide = torch.promote_types(p.dtype, torch.float32)
    terms = p.to(wide) * q.to(wide)
    # A sum each: adding one by one into the rows of a result would round as often as there are tokens.
    sums = [x.sum(0) for x in torch.split(terms, starts.diff().tolist())]
    return torch.stack(sums) if sums else terms.new_zeros(0, p.shape[1])


def _cpu(p: Tensor, q: Tensor, starts: Tensor) -> Tensor:
    from spectral_fast import _C

    p, q, starts = native.readable(p), native.readable(q), starts.contiguous()
    out = torch.empty(len(starts) - 1, p.shape[1])
    threads = torch.get_num_threads()
    _C.segment_products(p.data_ptr(), q.data_ptr(), native.CODES[p.dtype], starts.numpy(), out.numpy(), threads)
    return out


def _gpu(p: Tensor, q: Tensor, starts: Tensor) -> Tensor:
    from spectral_fast.kernels.sensitivity.gpu import segment_products

    return segment_products(p, q, starts)


def _refuses(elsewhere: Callable[[Iterable[Tensor]], str | None]) -> Callable[..., str | None]:
    def refuses(p: Tensor | None = None, q: Tensor | None = None, starts: Tensor | None = None) -> str | None:  # noqa: ARG001
        if p is not None and p.dtype == torch.float64:
            return "sums are in float32, and p is float64"
        return elsewhere([x for x in (p, q) if x is not None])

    return refuses


register(
    "sensitivity",
    Backend("cpu", _refuses(native.refuses), _cpu),
    Backend("gpu", _refuses(gpu.refuses_together), _gpu),
    Backend("reference", lambda *_: None, reference),
)

_op = define(
    "segment_products",
    "(Tensor p, Tensor q, Tensor starts) -> Tensor",
    _segment_products,
    lambda p, q, starts: p.new_empty(len(starts) - 1, p.shape[1], dtype=torch.promote_types(p.dtype, torch.float32)),  # noqa: ARG005
)

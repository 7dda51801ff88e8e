"""The autograd function, the two registered ops under it, and their backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_fast.backends import Backend, define, pick, register
from spectral_fast.kernels import gpu, native
from spectral_fast.kernels.sensitivity import check_starts
from spectral_fast.kernels.spectral_linear import reference

SINGULAR = (torch.float32, torch.float64)  # dtypes of s


def spectral_linear(
    x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, starts: Tensor | None = None
) -> Tensor:
    """Add a LoRA branch in spectral form to a base layer's output: y + scaling · ((x V) ⊙ s) Uᵀ.

    Differentiable once in x, y and s; u and vh are constants; autocast changes nothing. The gradient of s is the
    sensitivity g_k = scaling · Σ_n ⟨∂L/∂y_n, u_k⟩⟨x_n, v_k⟩, summed over all tokens in float32 (in float64 if x is).
    With `starts` every segment of tokens, such as a sample, has singular values of its own, and so a sensitivity:
    `s.expand(segments, r)` has the gradient per segment, and s their sum.

    Args:
        x: input of the layer, (..., n), the model's dtype.
        y: output of the base layer, (..., m), same leading shape.
        u: left singular vectors, (m, r), dtype of x.
        s: singular values, (r,), or (segments, r) with `starts`: float32 or float64.
        vh: right singular vectors as rows, (r, n), dtype of x.
        scaling: LoRA scale, alpha/r or alpha/sqrt(r).
        starts: first token of each segment and, last, the number of tokens, in the order of the leading dimensions:
            (segments + 1,) int64, on the CPU, starting at 0 and not descending.

    Returns:
        (..., m) in the dtype of y.

    Raises:
        ValueError: if the shapes do not fit together, or starts do not go from 0 to the number of tokens.
        TypeError: if dtypes do not fit.
        RuntimeError: the backend that ``SPECTRAL_FAST_BACKEND`` forces refuses.

    Cost: 2 · tokens · (n + m) · r flops in each direction; x, y and ∂L/∂y are read once.
    """
    (m, r), n = u.shape if u.ndim == 2 else (-1, -1), vh.shape[-1] if vh.ndim == 2 else -1
    singular = (r,) if starts is None else (len(starts) - 1, r)
    shapes = (x.shape[-1:], y.shape[-1:], s.shape, vh.shape)
    if shapes != ((n,), (m,), singular, (r, n)) or x.shape[:-1] != y.shape[:-1]:
        rows, number = ("(r,)", "") if starts is None else ("(segments, r)", f" and {len(starts) - 1} segments")
        raise ValueError(
            f"spectral_linear wants x (..., n), y (..., m), u (m, r), s {rows}, vh (r, n); got x {tuple(x.shape)}, "
            f"y {tuple(y.shape)}, u {tuple(u.shape)}, s {tuple(s.shape)}, vh {tuple(vh.shape)}{number}"
        )
    if x.dtype not in native.CODES or not (x.dtype == u.dtype == vh.dtype) or s.dtype not in SINGULAR:
        raise TypeError(
            f"x, u and vh must share one of {', '.join(map(str, native.CODES))}, and s be float32 or float64; got "
            f"x {x.dtype}, u {u.dtype}, vh {vh.dtype}, s {s.dtype}"
        )
    if len(devices := {str(t.device) for t in (x, y, u, s, vh)}) > 1:
        raise ValueError(f"x, y, u, s and vh must be on one device, got {', '.join(sorted(devices))}")
    # Shapes change outside of the function, whose output may not be a view: some models add to it in place.
    flat = x.reshape(-1, n), y.reshape(-1, m)
    out: Tensor = _SpectralLinear.apply(*flat, u, s, vh, scaling, starts)  # type: ignore[no-untyped-call]
    return out.view(y.shape)


class _SpectralLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, starts: Tensor | None
    ) -> Tensor:
        out, p = _forward_op(x, y, u, s, vh, scaling, starts)
        ctx.save_for_backward(p, u, s, vh, starts)
        ctx.scaling = scaling
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, u, s, vh, starts = ctx.saved_tensors
        wanted: bool = ctx.needs_input_grad[0]
        dx, g = _backward_op(dy, p, u, s, vh, ctx.scaling, starts, wanted)
        return dx if wanted else None, dy, None, g, None, None, None


def _forward(
    x: Tensor, y: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if starts is not None:
        check_starts(starts, len(x))
    with torch.autocast(x.device.type, enabled=False):
        out, p = pick("spectral_linear_forward", x, y, u, vh, s).call(x, y, u, s, vh, scaling, starts)
    return out, p


def _backward(
    dy: Tensor, p: Tensor, u: Tensor, s: Tensor, vh: Tensor, scaling: float, starts: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(dy.device.type, enabled=False):
        backend = pick("spectral_linear_backward", dy, p, u, vh, s)
        dx, g = backend.call(dy, p, u, s, vh, scaling, starts, wanted)
    return dx, g


def _gpu_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from spectral_fast.kernels.spectral_linear.gpu import forward

    return forward(*args)


def _gpu_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from spectral_fast.kernels.spectral_linear.gpu import backward

    return backward(*args)


def _refuses(*tensors: Tensor) -> str | None:
    """Of x, y, u, vh (or dy, p, u, vh), which share a dtype, and s, which need not."""
    dtypes = {x.dtype for x in tensors[:4]}
    if len(dtypes) > 1:
        return f"one dtype is wanted, and there are {', '.join(sorted(map(str, dtypes)))}"
    if torch.float64 in dtypes:
        return "sums are in float32, and x is float64"
    if tensors and (r := len(tensors[3])) > gpu.RANKS[-1]:
        return f"rank {r} is above {gpu.RANKS[-1]}"
    return gpu.refuses_together(tensors)


register(
    "spectral_linear_forward",
    Backend("gpu", _refuses, _gpu_forward),
    Backend("reference", lambda *_: None, reference.forward),
)
register(
    "spectral_linear_backward",
    Backend("gpu", _refuses, _gpu_backward),
    Backend("reference", lambda *_: None, reference.backward),
)

_forward_op = define(
    "spectral_linear_forward",
    "(Tensor x, Tensor y, Tensor u, Tensor s, Tensor vh, float scaling, Tensor? starts) -> (Tensor out, Tensor p)",
    _forward,
    lambda x, y, u, s, vh, scaling, starts: (y.new_empty(y.shape), x.new_empty(len(x), len(vh))),  # noqa: ARG005
)
_backward_op = define(
    "spectral_linear_backward",
    "(Tensor dy, Tensor p, Tensor u, Tensor s, Tensor vh, float scaling, Tensor? starts, bool wanted)"
    " -> (Tensor dx, Tensor g)",
    _backward,
    lambda dy, p, u, s, vh, scaling, starts, wanted: (  # noqa: ARG005
        vh.new_empty(len(dy) if wanted else 0, vh.shape[1]),
        s.new_empty(s.shape),
    ),
)

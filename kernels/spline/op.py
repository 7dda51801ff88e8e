"""The autograd function, the two registered ops under it, and their backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_fast.backends import Backend, define, pick, register
from spectral_fast.kernels import gpu, native
from spectral_fast.kernels.spline import reference
from spectral_fast.kernels.spline.reference import Shape

METHODS = ("piecewise", "soft")


def spline(
    x: Tensor,
    values: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    k_min: float = -3.0,
    k_max: float = 3.0,
    *,
    clamp: bool = True,
    extrapolate: bool | None = None,
    method: str = "piecewise",
    base: Tensor | None = None,
) -> Tensor:
    """A spline on every element: y = s_out φ(s), s = s_in · clamp(x), by K values v_i at knots k_i = k_min + i dk.

    Piecewise: φ(s) = (1 − t) v_i + t v_{i+1} with i + t = (s − k_min)/dk, linear between the knots. Soft: φ(s) = Σ w_i
    v_i with w = softmax(−(s − k_i)²/τ), τ = 0.37 dk²; where the values are the grid it is off s by up to dk/16.
    Differentiable once in x, values, both scales and base. Autocast changes nothing.

    Args:
        x: output of the LoRA branch, scaling included: any shape; bfloat16, float16, float32 or float64.
        values: v, (K,) with K ≥ 2, any floating dtype; float32 beside a bfloat16 x is what training wants.
        input_scale: s_in, one element.
        output_scale: s_out, one element.
        k_min: the first knot.
        k_max: the last knot.
        clamp: whether x is clamped to [k_min, k_max], which is before it is scaled: scaling may lead out of the grid.
        extrapolate: of a piecewise spline, whether the first and last piece go on beyond the grid; else their end
            values do. None for ``not clamp``: without clamp, and with the grid for values, the spline is x itself.
        method: "piecewise" or "soft".
        base: what y is added to in the same pass, such as the base layer's output: the shape of x.

    Returns:
        The shape of x, and its dtype or that of base.

    Raises:
        ValueError: shapes, knots, method or options do not fit.
        TypeError: dtypes do not fit.
        RuntimeError: the backend that ``SPECTRAL_FAST_BACKEND`` forces refuses.
    """
    if method not in METHODS:
        raise ValueError(f"method must be {' or '.join(METHODS)}, got {method!r}")
    soft = method == "soft"
    if extrapolate is None:
        extrapolate = not (clamp or soft)
    if soft and extrapolate:
        raise ValueError("a soft spline tends to its end values beyond the grid: extrapolate is of a piecewise one")
    if not (math.isfinite(k_min) and math.isfinite(k_max) and k_min < k_max):
        raise ValueError(f"the grid must go from a finite k_min up to a finite k_max, got {k_min} to {k_max}")
    if values.ndim != 1 or len(values) < 2 or input_scale.numel() != 1 or output_scale.numel() != 1:
        raise ValueError(
            f"spline wants values (K,) with K of at least 2 and two scales of one element, got {tuple(values.shape)}, "
            f"{tuple(input_scale.shape)} and {tuple(output_scale.shape)}"
        )
    parameters = (values, input_scale, output_scale)
    tensors = (x, *parameters) if base is None else (x, *parameters, base)
    if any(t.dtype not in native.CODES for t in tensors):
        raise TypeError(
            f"spline wants {', '.join(map(str, native.CODES))}; got {', '.join(str(t.dtype) for t in tensors)}"
        )
    if base is not None and base.shape != x.shape:
        raise ValueError(f"base must have the shape of x, {tuple(x.shape)}, got {tuple(base.shape)}")
    if len(devices := {str(t.device) for t in tensors}) > 1:
        raise ValueError(f"x, values, scales and base must be on one device, got {', '.join(sorted(devices))}")
    shape = Shape(k_min, k_max, clamp, extrapolate, soft)
    y: Tensor = _Spline.apply(x, *parameters, shape, base)  # type: ignore[no-untyped-call]
    return y


class _Spline(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        input_scale: Tensor,
        output_scale: Tensor,
        shape: Shape,
        base: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values, input_scale, output_scale)
        ctx.shape = shape
        return _forward_op(x, values, input_scale, output_scale, *shape, base)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward_op(dy, *ctx.saved_tensors, *ctx.shape), None, dy if ctx.needs_input_grad[-1] else None


def _forward(
    x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, k_min: float, k_max: float, clamp: bool,
    extrapolate: bool, soft: bool, base: Tensor | None,
) -> Tensor:  # fmt: skip
    shape = Shape(k_min, k_max, clamp, extrapolate, soft)
    with torch.autocast(x.device.type, enabled=False):
        backend = pick("spline_forward", x, values, input_scale, output_scale, base)
        y: Tensor = backend.call(x, values, input_scale, output_scale, shape, base)
    return y


def _backward(
    dy: Tensor, x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, k_min: float, k_max: float,
    clamp: bool, extrapolate: bool, soft: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = Shape(k_min, k_max, clamp, extrapolate, soft)
    with torch.autocast(x.device.type, enabled=False):
        backend = pick("spline_backward", dy, x, values, input_scale, output_scale)
        dx, d_values, d_in, d_out = backend.call(dy, x, values, input_scale, output_scale, shape)
    return dx, d_values, d_in, d_out


def _cpu_forward(
    x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, shape: Shape, base: Tensor | None
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype if base is None else base.dtype)
    _native(x, base, y, y.dtype, values, input_scale, output_scale, shape, None)
    return y


def _cpu_backward(
    dy: Tensor, x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, sums = torch.empty(x.shape, dtype=x.dtype), torch.empty(len(values) + 1, dtype=torch.float64)
    _native(x, dy, dx, dy.dtype, values, input_scale, output_scale, shape, sums.numpy())
    return dx, *reference.parameter_gradients(sums, values, input_scale, output_scale)


def _gpu_forward(*args: Any) -> Tensor:
    from spectral_fast.kernels.spline.gpu import forward

    return forward(*args)


def _gpu_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from spectral_fast.kernels.spline.gpu import backward

    return backward(*args)


def _native(
    x: Tensor, y: Tensor | None, out: Tensor, y_dtype: torch.dtype, values: Tensor, input_scale: Tensor,
    output_scale: Tensor, shape: Shape, sums: NDArray[np.float64] | None,
) -> None:  # fmt: skip
    from spectral_fast import _C

    x, y = native.readable(x), None if y is None else native.readable(y)
    _C.spline(
        x.data_ptr(),
        0 if y is None else y.data_ptr(),
        out.data_ptr(),
        native.CODES[x.dtype],
        native.CODES[y_dtype],
        x.numel(),
        native.readable(values.detach().double()).numpy(),
        (input_scale.item(), output_scale.item(), shape.k_min, shape.k_max, reference.SOFTNESS),
        (shape.clamp, shape.extrapolate, shape.soft),
        sums,
        torch.get_num_threads(),
    )


def _refuses(elsewhere: Callable[[Iterable[Tensor]], str | None]) -> Callable[..., str | None]:
    """Of x, the three parameters, and base or dy, which may be None."""

    def refuses(*tensors: Tensor | None) -> str | None:
        there = [x for x in tensors if x is not None]
        if there and torch.float64 in (there[0].dtype, there[-1].dtype):
            return "elements are worked on in float32, and there are some in float64"
        return elsewhere(there)

    return refuses


register(
    "spline_forward",
    Backend("cpu", _refuses(native.refuses), _cpu_forward),
    Backend("gpu", _refuses(gpu.refuses_together), _gpu_forward),
    Backend("reference", lambda *_: None, reference.forward),
)
register(
    "spline_backward",
    Backend("cpu", _refuses(native.refuses), _cpu_backward),
    Backend("gpu", _refuses(gpu.refuses_together), _gpu_backward),
    Backend("reference", lambda *_: None, reference.backward),
)

_PARAMETERS = "Tensor values, Tensor input_scale, Tensor output_scale"
_SHAPE = "float k_min, float k_max, bool clamp, bool extrapolate, bool soft"
_forward_op = define(
    "spline_forward",
    f"(Tensor x, {_PARAMETERS}, {_SHAPE}, Tensor? base) -> Tensor",
    _forward,
    lambda x, *others: x.new_empty(x.shape, dtype=(x if others[-1] is None else others[-1]).dtype),
)
_backward_op = define(
    "spline_backward",
    f"(Tensor dy, Tensor x, {_PARAMETERS}, {_SHAPE}) -> (Tensor dx, Tensor dv, Tensor d_in, Tensor d_out)",
    _backward,
    lambda dy, x, v, s_in, s_out, *shape: tuple(t.new_empty(t.shape) for t in (x, v, s_in, s_out)),  # noqa: ARG005
)

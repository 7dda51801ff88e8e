"""The definition of the spline, and its gradients written out: a pass per knot, in float32, or float64 if x is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# τ / dk² of the soft spline: of all, this is nearest to the identity where the values are the grid.
SOFTNESS = 0.37


class Shape(NamedTuple):
    """All of a spline that is not learnt.

    Attributes:
        k_min: the first knot.
        k_max: the last knot.
        clamp: whether inputs are clamped to [k_min, k_max] before they are scaled.
        extrapolate: whether the first and last piece go on beyond the grid, rather than their end values.
        soft: whether values are averaged by a softmax over the knots rather than interpolated.
    """

    k_min: float
    k_max: float
    clamp: bool
    extrapolate: bool
    soft: bool

    def step(self, knots: int) -> float:
        """The distance dk of two knots."""
        return (self.k_max - self.k_min) / (knots - 1)


def spline_reference(
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
) -> Tensor:
    """The equations of `spline`, left to autograd; arguments as there."""
    soft = method == "soft"
    shape = Shape(k_min, k_max, clamp, not (clamp or soft) if extrapolate is None else extrapolate, soft)
    return _spline(x, values, input_scale, output_scale, shape).to(x.dtype)


def forward(
    x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, shape: Shape, base: Tensor | None
) -> Tensor:
    """The backend's call."""
    y = _spline(x, values, input_scale, output_scale, shape)
    return y.to(x.dtype).contiguous() if base is None else (base + y).to(base.dtype).contiguous()


def _spline(x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, shape: Shape) -> Tensor:
    x, v, s_in, s_out = _wide(x, values, input_scale, output_scale)
    s = _scaled(x, s_in, shape)
    if shape.soft:
        phi = torch.zeros_like(s)
        for weight, value in zip(_weights(s, len(v), shape), v, strict=True):
            phi = phi + weight * value
        return s_out * phi
    dk = shape.step(len(v))
    slopes = v.diff() / dk
    i = _piece(s, len(v), shape)
    # Slope and intercept: of s near 0 all digits are kept.
    intercepts = v[:-1] - slopes * (shape.k_min + dk * torch.arange(len(slopes), dtype=v.dtype, device=v.device))
    return s_out * (intercepts[i] + slopes[i] * _saturated(s, shape))


def backward(
    dy: Tensor, x: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend's call: the gradients of x, values, input_scale and output_scale."""
    wide, v, s_in, s_out, up = _wide(x, values, input_scale, output_scale, dy)
    s, knots, dk = _scaled(wide, s_in, shape), len(values), shape.step(len(values))
    # Of the value at knot i Σ dy w_i, and so of s_out Σ_i v_i of that: the weights are all that is needed.
    sums = torch.stack([(up * weight).sum(dtype=torch.float64) for weight in _weights(s, knots, shape)])
    if shape.soft:
        phi = _spline(x, values, input_scale, torch.ones_like(s_out), shape)
        slope = torch.zeros_like(s)
        for i, (weight, value) in enumerate(zip(_weights(s, knots, shape), v, strict=True)):
            slope += 2 / (SOFTNESS * dk**2) * weight * (value - phi) * (shape.k_min + i * dk - s)
    else:
        slope = (v.diff() / dk)[_piece(s, knots, shape)]
        slope = slope if shape.extrapolate else slope.where((s >= shape.k_min) & (s <= shape.k_max), 0)
    ds = up * slope
    of_slope = (ds * (wide.clamp(shape.k_min, shape.k_max) if shape.clamp else wide)).sum(dtype=torch.float64)
    sums = torch.cat([sums, of_slope[None]])
    dx = s_in * s_out * ds
    if shape.clamp:
        dx = dx.where((wide >= shape.k_min) & (wide <= shape.k_max), 0)
    return dx.to(x.dtype).contiguous(), *parameter_gradients(sums, values, input_scale, output_scale)


def parameter_gradients(
    sums: Tensor, values: Tensor, input_scale: Tensor, output_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of values and scales from sums (K + 1): of dy w_i for every knot, and last of dy φ'(s) clamp(x)."""
    of_values, of_slope = sums[:-1], sums[-1:]
    return (
        (output_scale.double() * of_values).to(values.dtype),
        (output_scale.double() * of_slope).to(input_scale.dtype).view(input_scale.shape),
        (values.double() @ of_values).to(output_scale.dtype).view(output_scale.shape),
    )


def _wide(x: Tensor, *others: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [t.to(dtype) for t in (x, *others)]


def _scaled(x: Tensor, s_in: Tensor, shape: Shape) -> Tensor:
    """What the spline is evaluated at: clamped first, so scaling may lead out of the grid."""
    return (x.clamp(shape.k_min, shape.k_max) if shape.clamp else x) * s_in


def _saturated(s: Tensor, shape: Shape) -> Tensor:
    return s if shape.extrapolate else s.clamp(shape.k_min, shape.k_max)


def _piece(s: Tensor, knots: int, shape: Shape) -> Tensor:
    """The piece of each element, 0 to knots - 2."""
    piece = ((s.detach() - shape.k_min) / shape.step(knots)).floor()
    return piece.nan_to_num(0).clamp(0, knots - 2).long()


def _weights(s: Tensor, knots: int, shape: Shape) -> Iterator[Tensor]:
    """The weight of every knot's value, one after the other."""
    dk = shape.step(knots)
    if shape.soft:
        u = (s - shape.k_min) / dk
        # Relative to the largest weight, that of the nearest knot.
        nearest = (u - u.detach().round().clamp(0, knots - 1)).square()
        total = torch.zeros_like(u)
        for i in range(knots):
            total = total + ((nearest - (u - i).square()) / SOFTNESS).exp()
        for i in range(knots):
            yield ((nearest - (u - i).square()) / SOFTNESS).exp() / total
        return
    piece = _piece(s, knots, shape)
    t = (_saturated(s, shape) - shape.k_min) / dk - piece
    for i in range(knots):
        yield (1 - t).where(piece == i, 0) + t.where(piece == i - 1, 0)

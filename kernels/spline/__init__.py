"""A learnable spline on the output of a LoRA branch: y = s_out φ(s_in · clamp(z)), elementwise, by K knots.

Piecewise linear, or a softmax over the knots. Forward z is read once and y written once; backward z and ∂L/∂y are
read once and ∂L/∂z is written once, with the gradients of the knots' values and of both scales summed on the way. No
(N × K) tensor is ever formed.
"""

from spectral_fast.kernels.spline.op import spline
from spectral_fast.kernels.spline.reference import SOFTNESS, spline_reference

__all__ = ["SOFTNESS", "spline", "spline_reference"]

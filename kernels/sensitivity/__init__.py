"""Sensitivities from projections: g_tk = Σ_n p_nk q_nk over the tokens n of a segment t (a sample, or all of them).

With p = x V and q = (∂L/∂y) U, which the forward and backward pass of a LoRA module in spectral form leave anyway,
∂L/∂s_k = scaling · Σ_n p_nk q_nk. One pass over p and q, sums in float32, in an order that does not depend on
anything but the segments.

Source: Tian et al., "Spectral Surgery", arXiv:2603.03995, equation of the sensitivity.
"""

from spectral_fast.kernels.sensitivity.grouped import grouped_products, grouped_reference
from spectral_fast.kernels.sensitivity.module import Module
from spectral_fast.kernels.sensitivity.op import check_starts, segment_products

__all__ = ["Module", "check_starts", "grouped_products", "grouped_reference", "segment_products"]

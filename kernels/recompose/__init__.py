"""Tall and flat factors times small transforms, B' = B T and A' = T A, for all modules of an adapter at once.

The second half of every edit: with U = B T_B and V = Aᵀ T_A the factors of U diag(s') Vᵀ are
B' = B (T_B diag(√s')) and A' = (diag(√s') T_Aᵀ) A. Each factor is streamed once through pieces that stay in cache,
and may be overwritten in place; values that are not finite are found as they are stored.

Source: Tian et al., "Spectral Surgery", arXiv:2603.03995, the reconstruction step.
"""

from spectral_fast.kernels.recompose.op import recompose
from spectral_fast.kernels.recompose.product import Product

__all__ = ["Product", "recompose"]

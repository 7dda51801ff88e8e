"""Policies with a smooth gate over x = |g| / norm(|g|): smooth_abs, double_smooth, z_score, robust_z, spectral_gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from spectral_fast.options import option

from .base import TINY, Fractions, Gains, Module, Outcome, Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SmoothAbs(Fractions):
    """One sigmoid over x: gate = sup + (amp - sup) sigmoid((x - mu) / tau).

    tau = smooth_temperature (quantile(1 - core_frac) - quantile(noise_frac)). mu is the smooth_center_q
    quantile, shifted so that the gate there is mid_factor if smooth_align_mid and sup < mid < amp. Flat x:
    gate = mid. Core, for reports, is x above the upper of the two quantiles, noise is x below the lower.
    """

    mode: ClassVar[str] = "smooth_abs"

    smooth_temperature: float = option(0.35, "width of the sigmoid, relative to the spread of |g|", positive=True)
    smooth_center_q: float = option(0.5, "quantile of |g| at the sigmoid's centre", low=0.0, high=1.0)
    smooth_align_mid: bool = option(True, "shift the sigmoid so that the gain at the centre is mid_factor")

    def _rule(self, module: Module) -> Outcome:
        x = self._normalised(module.g.abs())
        q_lo, q_hi = self.noise_frac, 1.0 - self.core_frac
        if q_hi <= q_lo:
            q_lo, q_hi = 0.25, 0.75
        lo, hi, center = (x.quantile(q) for q in (q_lo, q_hi, self.smooth_center_q))
        tau = (self.smooth_temperature * (hi - lo).clamp_min(TINY)).clamp_min(TINY)
        amp, sup, mid = self.amp_factor, self.sup_factor, self.mid_factor
        mu = center
        if self.smooth_align_mid and sup < mid < amp:
            p = min(max((mid - sup) / (amp - sup), 1e-4), 1.0 - 1e-4)
            mu = center - tau * math.log(p / (1.0 - p))
        flat = bool(x.max() - x.min() < 1e-12)
        gate = x.new_full(x.shape, mid) if flat else sup + (amp - sup) * ((x - mu) / tau).sigmoid()
        points = {"lo": lo, "hi": hi, "center": center, "mu": mu, "tau": tau}
        stats = {"q_lo": q_lo, "q_hi": q_hi, "center_q": self.smooth_center_q}
        stats |= {key: value.item() for key, value in points.items()}
        return _gated(module.s, gate, (not flat) & (x > hi), (not flat) & (x < lo), stats | {"degenerate": flat})


@dataclass(frozen=True, kw_only=True)
class DoubleSmooth(Fractions):
    """Two sigmoids: gate = mid - (mid - sup) sigmoid((t_n - x) / tau) + (amp - mid) sigmoid((x - t_c) / tau).

    t_n = quantile(noise_frac), t_c = quantile(1 - core_frac), tau = smooth_temperature (max x - min x).
    Core, for reports, is x > t_c, noise is x < t_n.
    """

    mode: ClassVar[str] = "double_smooth"

    smooth_temperature: float = option(0.35, "width of the sigmoids, relative to the range of |g|", positive=True)

    def _rule(self, module: Module) -> Outcome:
        x = self._normalised(module.g.abs())
        q_noise, q_core = self.noise_frac, 1.0 - self.core_frac
        if q_noise >= q_core:
            q_noise, q_core = 0.45, 0.55
        t_noise, t_core = x.quantile(q_noise), x.quantile(q_core)
        tau = (self.smooth_temperature * (x.max() - x.min()).clamp_min(TINY)).clamp_min(TINY)
        gate = _double_sigmoid(self, (t_noise - x) / tau, (x - t_core) / tau)
        stats = {"threshold_noise": t_noise.item(), "threshold_core": t_core.item(), "tau": tau.item()}
        return _gated(module.s, gate, x > t_core, x < t_noise, stats)


@dataclass(frozen=True, kw_only=True)
class ZScore(Gains):
    """The sigmoids of `double_smooth` over z = (x - mean) / std: thresholds z_low, z_high, width z_tau.

    std is the population's. A flat x (std < z_fallback_std or max |z| < 1e-3) leaves s as it is: gate = 1,
    not mid. Core, for reports, is z > z_high, noise is z < z_low.
    """

    mode: ClassVar[str] = "z_score"

    z_high: float = option(1.0, "z above which a direction is core")
    z_low: float = option(-0.5, "z below which a direction is noise")
    z_tau: float = option(0.2, "width of the sigmoids in z", positive=True)
    z_fallback_std: float = option(1e-6, "leave s alone if the std of normalised |g| is smaller", low=0.0)

    def _rule(self, module: Module) -> Outcome:
        x = self._normalised(module.g.abs())
        mean, std = x.mean(), x.std(correction=0).clamp_min(TINY)
        z = (x - mean) / std
        flat = bool(std < self.z_fallback_std) or bool(z.abs().max() < 1e-3)
        stats = {"mu": mean.item(), "std": std.item()}
        return _z_gated(self, module.s, z, flat, self.z_low, self.z_high, self.z_tau, stats)


@dataclass(frozen=True, kw_only=True)
class RobustZ(Gains):
    """`z_score` with z = (x - median) / max(1.4826 MAD, 1e-8), both medians the lower one for even r.

    Where that denominator is below robust_fallback_sigma, s stays as it is: gate = 1, not mid.
    """

    mode: ClassVar[str] = "robust_z"

    robust_z_high: float = option(1.0, "robust z above which a direction is core")
    robust_z_low: float = option(-0.5, "robust z below which a direction is noise")
    robust_z_tau: float = option(0.2, "width of the sigmoids in robust z", positive=True)
    robust_fallback_sigma: float = option(1e-6, "leave s alone if 1.4826 MAD of normalised |g| is smaller", low=0.0)

    def _rule(self, module: Module) -> Outcome:
        x = self._normalised(module.g.abs())
        median = x.median()
        mad = (x - median).abs().median()
        sigma = (1.4826 * mad).clamp_min(TINY)
        flat = bool(sigma < self.robust_fallback_sigma)
        stats = {"median": median.item(), "mad": mad.item(), "sigma_robust": sigma.item()}
        z, (low, high, tau) = (x - median) / sigma, (self.robust_z_low, self.robust_z_high, self.robust_z_tau)
        return _z_gated(self, module.s, z, flat, low, high, tau, stats)


@dataclass(frozen=True, kw_only=True)
class SpectralGate(Policy):
    """One sigmoid over x rescaled to [0, 1]: gate = sup + (amp - sup) sigmoid((x - pivot) / soft_temperature).

    Core, for reports, is x > pivot, noise is x < pivot.
    """

    mode: ClassVar[str] = "spectral_gate"
    _overflow_hint: ClassVar[str] = "amp_factor, sup_factor or sigma_clip_min"

    amp_factor: float = option(1.25, "gain of core directions, where |g| is large", low=0.0)
    sup_factor: float = option(0.80, "gain of noise directions, where |g| is small", low=0.0)
    soft_temperature: float = option(0.35, "width of the sigmoid over |g| rescaled to [0, 1]", positive=True)
    soft_pivot_mode: str = option(
        "median", "which |g| is the sigmoid's centre", choices=("median", "mean", "max", "min")
    )

    def _rule(self, module: Module) -> Outcome:
        x = self._normalised(module.g.abs())
        x = (x - x.min()) / (x.max() - x.min()).clamp_min(TINY)
        pivot = getattr(x, self.soft_pivot_mode)()
        amp, sup = self.amp_factor, self.sup_factor
        gate = sup + (amp - sup) * ((x - pivot) / max(self.soft_temperature, TINY)).sigmoid()
        return _gated(module.s, gate, x > pivot, x < pivot, {"pivot": pivot.item(), "tau": self.soft_temperature})


def _double_sigmoid(gains: Gains, below: Tensor, above: Tensor) -> Tensor:
    """The gate of a direction `below` the noise threshold and `above` the core threshold, both in widths."""
    mid = gains.mid_factor
    suppressed = (mid - gains.sup_factor) * below.sigmoid()
    return mid - suppressed + (gains.amp_factor - mid) * above.sigmoid()


def _z_gated(
    gains: Gains, s: Tensor, z: Tensor, flat: bool, low: float, high: float, tau: float, stats: dict[str, Any]
) -> Outcome:
    width = max(tau, TINY)
    gate = z.new_ones(z.shape) if flat else _double_sigmoid(gains, (low - z) / width, (z - high) / width)
    core, noise = (not flat) & (z > high), (not flat) & (z < low)
    k_core, k_noise = int(core.sum()), int(noise.sum())
    stats |= {"z_high": high, "z_low": low, "tau": tau, "k_core_eff": k_core, "k_noise_eff": k_noise}
    stats |= {"frac_core": k_core / s.numel(), "frac_noise": k_noise / s.numel(), "fallback": flat}
    return _gated(s, gate, core, noise, stats)


def _gated(s: Tensor, gate: Tensor, core: Tensor, noise: Tensor, stats: dict[str, Any]) -> Outcome:
    extent = {"gate_min": gate.min().item(), "gate_max": gate.max().item()}
    return Outcome(s * gate, core, noise, stats | extent)

"""The policies in plain numpy, written from the formulas of the method alone, and (s, g) to try them on."""

from __future__ import annotations

import math

import numpy as np
import torch

from spectral_fast.policies import Edit, Policy

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def lower_median(x: Array) -> float:
    return float(np.sort(x)[(len(x) - 1) // 2])


def quantile(x: Array, q: float) -> float:
    ordered, position = np.sort(x), q * (len(x) - 1)
    below = math.floor(position)
    above = min(below + 1, len(x) - 1)
    return float(ordered[below] + (position - below) * (ordered[above] - ordered[below]))


def normalise(g: Array, how: str) -> Array:
    norm = {"none": 1.0, "mean_abs": max(np.abs(g).mean(), 1e-8), "l2": max(np.sqrt((g * g).sum()), 1e-8)}[how]
    return g / norm


def two_gates(x: Array, low: float, high: float, tau: float, p: dict) -> Array:
    mid, amp, sup = p["mid_factor"], p["amp_factor"], p["sup_factor"]
    return mid - (mid - sup) * sigmoid((low - x) / tau) + (amp - mid) * sigmoid((x - high) / tau)


def oracle_gate(mode: str, g: Array, p: dict) -> Array:
    x, r = normalise(np.abs(g), p["grad_norm"]), len(g)
    if mode == "abs_select":
        k_core = min(r, max(int(np.rint(r * p["core_frac"])), p["min_core_k"]))
        k_noise = max(0, min(int(np.rint(r * p["noise_frac"])), r - k_core))
        order = sorted(range(r), key=lambda k: (-abs(g[k]), k))
        gate = np.full(r, p["mid_factor"])
        gate[order[:k_core]] = p["amp_factor"]
        gate[order[r - k_noise :]] = p["sup_factor"]
        return gate
    if mode == "smooth_abs":
        sup, mid, amp = p["sup_factor"], p["mid_factor"], p["amp_factor"]
        if x.max() - x.min() < 1e-12:
            return np.full(r, mid)
        low, high = p["noise_frac"], 1 - p["core_frac"]
        if high <= low:
            low, high = 0.25, 0.75
        tau = max(p["smooth_temperature"] * max(quantile(x, high) - quantile(x, low), 1e-8), 1e-8)
        mu = quantile(x, p["smooth_center_q"])
        if p["smooth_align_mid"] and sup < mid < amp:
            share = min(max((mid - sup) / (amp - sup), 1e-4), 1 - 1e-4)
            mu -= tau * (math.log(share) - math.log(1 - share))
        return sup + (amp - sup) * sigmoid((x - mu) / tau)
    if mode == "double_smooth":
        low, high = p["noise_frac"], 1 - p["core_frac"]
        if low >= high:
            low, high = 0.45, 0.55
        tau = max(p["smooth_temperature"] * max(x.max() - x.min(), 1e-8), 1e-8)
        return two_gates(x, quantile(x, low), quantile(x, high), tau, p)
    if mode == "z_score":
        std = math.sqrt(((x - x.mean()) ** 2).mean())
        z = (x - x.mean()) / max(std, 1e-8)
        if std < p["z_fallback_std"] or np.abs(z).max() < 1e-3:
            return np.ones(r)
        return two_gates(z, p["z_low"], p["z_high"], max(p["z_tau"], 1e-8), p)
    if mode == "spectral_gate":
        x = (x - x.min()) / max(x.max() - x.min(), 1e-8)
        pivot = {"median": lower_median, "mean": np.mean, "max": np.max, "min": np.min}[p["soft_pivot_mode"]](x)
        spread = p["amp_factor"] - p["sup_factor"]
        return p["sup_factor"] + spread * sigmoid((x - pivot) / max(p["soft_temperature"], 1e-8))
    assert mode == "robust_z"
    median = lower_median(x)
    scale = max(1.4826 * lower_median(np.abs(x - median)), 1e-8)
    if scale < p["robust_fallback_sigma"]:
        return np.ones(r)
    return two_gates((x - median) / scale, p["robust_z_low"], p["robust_z_high"], max(p["robust_z_tau"], 1e-8), p)


def oracle_descent(s: Array, g: Array, p: dict) -> Array:
    x = normalise(g, p["grad_norm"])
    if p["asymmetric_update"]:
        step = np.where(x > 0, p["eta_suppress"] * np.maximum(x, 0) ** p["pos_power"], p["eta_enhance"] * x)
    else:
        step = p["eta"] * x
    return s - step if p["update_mode"] == "additive" else s * np.exp(-step)


def oracle(mode: str, s: Array, g: Array, p: dict) -> Array:
    new = oracle_descent(s, g, p) if mode == "gd" else s * oracle_gate(mode, g, p)
    new = np.maximum(new, p["sigma_clip_min"])
    if p["preserve_energy"] == "l1":
        return new * (max(s.sum(), 1e-8) / max(new.sum(), 1e-8))
    if p["preserve_energy"] == "l2":
        return new * (max(np.sqrt((s * s).sum()), 1e-8) / max(np.sqrt((new * new).sum()), 1e-8))
    return new


def spectra() -> dict[str, tuple[Array, Array]]:
    rng = np.random.default_rng(0)
    cases = {f"random {r}": (np.sort(rng.exponential(size=r))[::-1], rng.normal(size=r)) for r in (3, 8, 16, 17, 64)}
    s, g = cases["random 16"]
    tied = np.repeat(rng.normal(size=4), 4)[rng.permutation(16)]
    return cases | {
        "rank 1": (np.array([0.7]), np.array([-2.0])),
        "rank 2": (np.array([2.0, 0.5]), np.array([0.1, -3.0])),
        "constant g": (s, np.full(16, 0.3)),
        "zero g": (s, np.zeros(16)),
        "zero s": (np.zeros(16), g),
        "half zero s": (np.where(np.arange(16) < 8, s, 0.0), g),
        "ties": (s, tied),
        "tied in size": (s, np.abs(tied) * np.where(np.arange(16) % 2, 1, -1)),
        "one large g": (s, np.where(np.arange(16) == 5, 1e6, 1e-3)),
        "positive g": (s, np.abs(g)),
        "negative g": (s, -np.abs(g)),
        "wide g": (s, np.sign(g) * np.geomspace(1e-30, 1e30, 16)),
        "wide s": (np.geomspace(1e30, 1e-30, 16), g),
        "close g": (s, 1.0 + 1e-9 * rng.permutation(16)),
        "nearly constant g": (s, 1.0 + 1e-14 * rng.permutation(16)),
        "denormal g": (s, 5e-324 * np.arange(1, 17)),
        "denormal s": (5e-324 * np.arange(16, 0, -1), g),
        "small g": (s, 1e-9 * g),
        "unsorted s": (s[rng.permutation(16)], g),
    }


def apply(policy: Policy, s: Array, g: Array | None, name: str = "layers.0.q_proj") -> Edit:
    return policy.apply(torch.from_numpy(s.copy()), None if g is None else torch.from_numpy(g.copy()), name)

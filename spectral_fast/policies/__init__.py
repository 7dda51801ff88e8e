"""Policies: rules from a spectrum s and its sensitivity g = dL/ds to an edited spectrum s'.

Every policy runs the same three steps in float64: its own rule, then s' = max(s', sigma_clip_min), then the
energy step. A frozen dataclass per mode holds exactly the hyperparameters that the mode uses, under the
names of the command-line flags and with their defaults; `metadata` of each field carries `help` and
`choices`. `POLICIES` maps the mode to its dataclass.

Source: Tian, Chen, Han, Liao, "Spectral Surgery: Training-Free Refinement of LoRA via Gradient-Guided
    Singular Value Reweighting", arXiv:2603.03995, with the constants of its public implementation
    lora-spectral-edit 0.1.0.
"""

from __future__ import annotations

from .base import Edit, Policy
from .descent import GradientDescent
from .gates import DoubleSmooth, RobustZ, SmoothAbs, SpectralGate, ZScore
from .selection import AbsSelect, RandomIndex, hard_choice, matched_control

POLICIES: dict[str, type[Policy]] = {
    policy.mode: policy
    for policy in (AbsSelect, SmoothAbs, DoubleSmooth, ZScore, RobustZ, RandomIndex, GradientDescent, SpectralGate)
}

__all__ = [
    "POLICIES",
    "AbsSelect",
    "DoubleSmooth",
    "Edit",
    "GradientDescent",
    "Policy",
    "RandomIndex",
    "RobustZ",
    "SmoothAbs",
    "SpectralGate",
    "ZScore",
    "hard_choice",
    "matched_control",
]

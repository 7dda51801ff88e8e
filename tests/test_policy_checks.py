"""Policies: what they refuse, and how they say so."""

from __future__ import annotations

import math

import numpy as np
import pytest
from policy_oracle import apply

from spectral_fast.policies import POLICIES, AbsSelect, GradientDescent, Policy, SmoothAbs


@pytest.mark.parametrize("mode", POLICIES)
def test_a_module_of_rank_zero_comes_back_empty(mode: str) -> None:
    edit = apply(POLICIES[mode](), np.zeros(0), np.zeros(0))
    assert edit.s_new.shape == edit.core.shape == edit.noise.shape == (0,)
    assert edit.stats["sigma_new_sum"] == 0


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_with_module_and_index(mode: str, value: float) -> None:
    good, bad = np.ones(4), np.array([1.0, 1.0, value, 1.0])
    with pytest.raises(ValueError, match=r"layers\.7: s\[2\] is -?(nan|inf)"):
        apply(POLICIES[mode](), bad, good, "layers.7")
    with pytest.raises(ValueError, match=r"layers\.7: g\[2\] is -?(nan|inf)"):
        apply(POLICIES[mode](), good, bad, "layers.7")


def test_wrong_shapes_signs_and_missing_g_are_refused() -> None:
    with pytest.raises(ValueError, match="m: s has 3 values but g has 4"):
        apply(AbsSelect(), np.ones(3), np.ones(4), "m")
    with pytest.raises(ValueError, match=r"m: s must be a real vector \(r,\); got shape \(2, 2\)"):
        apply(AbsSelect(), np.ones((2, 2)), np.ones((2, 2)), "m")
    with pytest.raises(ValueError, match="must be a real vector"):
        apply(AbsSelect(), np.ones(2), np.ones(2, dtype=complex), "m")
    with pytest.raises(ValueError, match="m: singular values must be >= 0; got -1"):
        apply(AbsSelect(), np.array([1.0, -1.0]), np.ones(2), "m")
    for mode in POLICIES:
        assert POLICIES[mode].needs_sensitivity == (mode != "random_index")
        if mode != "random_index":
            with pytest.raises(ValueError, match=f"m: mode {mode} needs the sensitivity g"):
                apply(POLICIES[mode](), np.ones(2), None, "m")


@pytest.mark.parametrize(
    ("policy", "g", "culprit"),
    [
        (GradientDescent(eta=1e4), [-1.0, 1.0], "eta"),
        (GradientDescent(grad_norm="none", preserve_energy="none"), [-1e5, 1.0], "grad_norm"),
        (GradientDescent(eta_enhance=1e5, asymmetric_update=True), [-1.0, 1.0], "eta_enhance"),
        (AbsSelect(amp_factor=1e200), [1.0, 2.0], "amp_factor"),
    ],
)
def test_overflow_names_the_module_and_the_hyperparameter(policy: Policy, g: list, culprit: str) -> None:
    for s in (np.ones(2), np.array([0.0, 1.0])):  # 0 * inf is nan, and refused as well
        if policy.mode == "abs_select" and s[0] == 0:
            continue
        with pytest.raises(ValueError, match=rf"layers\.3: mode {policy.mode} pushes s'.*{culprit}"):
            apply(policy, s, np.array(g), "layers.3")


@pytest.mark.parametrize(
    ("mode", "values", "message"),
    [
        ("abs_select", {"core_frac": 1.5}, "abs_select: core_frac must be 0 to 1; got 1.5"),
        ("abs_select", {"noise_frac": 1.1}, "noise_frac"),
        ("abs_select", {"sup_factor": -0.1}, "sup_factor"),
        ("smooth_abs", {"smooth_center_q": 2.0}, "smooth_center_q"),
        ("smooth_abs", {"smooth_center_q": 1.05}, "smooth_center_q"),
        ("double_smooth", {"smooth_temperature": 0.0}, "smooth_temperature must be above 0"),
        ("smooth_abs", {"smooth_temperature": 0.0}, "smooth_temperature must be above 0"),
        ("z_score", {"z_tau": -1.0}, "z_tau must be above 0"),
        ("z_score", {"z_high": math.nan}, "z_high must be finite; got nan"),
        ("robust_z", {"robust_fallback_sigma": math.inf}, "robust_fallback_sigma must be finite"),
        ("gd", {"pos_power": 0.0}, "pos_power must be above 0"),
        (
            "gd",
            {"update_mode": "sideways"},
            "update_mode must be one of additive, multiplicative; got 'sideways'",
        ),
        ("gd", {"grad_norm": "l1"}, "grad_norm must be one of none, mean_abs, l2"),
        ("gd", {"sigma_clip_min": -1.0}, "sigma_clip_min"),
        ("random_index", {"min_core_k": -1}, "min_core_k"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(mode: str, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POLICIES[mode](**values)


def test_hyperparameters_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"min_core_k must be int; got 1.5 \(float\)"):
        AbsSelect(min_core_k=1.5)
    with pytest.raises(TypeError, match="amp_factor must be float; got '2'"):
        AbsSelect(amp_factor="2")
    with pytest.raises(TypeError, match="amp_factor must be float; got True"):
        AbsSelect(amp_factor=True)
    with pytest.raises(TypeError, match="smooth_align_mid must be bool; got 1"):
        SmoothAbs(smooth_align_mid=1)
    with pytest.raises(TypeError, match="eta"):
        AbsSelect(eta=0.2)  # not a hyperparameter of this mode
    assert type(AbsSelect(amp_factor=2).amp_factor) is float

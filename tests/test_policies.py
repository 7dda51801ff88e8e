"""Policies: agreement with an oracle, worked examples, properties, statistics, errors."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from policy_oracle import apply, oracle, spectra

from spectral_fast.policies import POLICIES, AbsSelect, GradientDescent, RandomIndex, SmoothAbs, SpectralGate
from spectral_fast.policies.selection import matched_control

GATE_MODES = ("abs_select", "random_index", "smooth_abs", "double_smooth", "z_score", "robust_z")


def settings(mode: str, n: int, seed: int) -> list[dict]:
    """The defaults, every single choice, and n random draws from the whole range of every hyperparameter."""
    rng = np.random.default_rng([seed, sorted(POLICIES).index(mode)])
    own = fields(POLICIES[mode])

    def draw(f: object) -> object:
        name, default = f.name, f.default  # type: ignore[attr-defined]
        if f.metadata["choices"]:  # type: ignore[attr-defined]
            return str(rng.choice(f.metadata["choices"]))  # type: ignore[attr-defined]
        if isinstance(default, bool):
            return bool(rng.integers(2))
        if isinstance(default, int):
            return int(rng.integers(20))
        if name.endswith(("_frac", "_q")):
            return float(rng.choice([0.0, 0.5, 1.0, rng.uniform(), rng.uniform(), rng.uniform()]))
        if name in ("z_high", "z_low", "robust_z_high", "robust_z_low"):
            return float(rng.normal())
        if "fallback" in name or name == "sigma_clip_min":
            return float(rng.choice([0.0, 1e-6, 0.05, 0.5]))
        if name.endswith("_factor"):
            return float(rng.choice([0.0, 1.0, rng.uniform(0, 3)]))
        return float(rng.choice([default, rng.uniform(0.01, 3)]))

    single = [{f.name: choice} for f in own if f.metadata["choices"] for choice in f.metadata["choices"]]
    single += [{f.name: not f.default} for f in own if isinstance(f.default, bool)]
    if mode == "smooth_abs":  # where the gate at the centre comes close to its limits
        single += [{"mid_factor": mid} for mid in (0.8, 0.8 + 1e-6, 0.82, 1.23, 1.25 - 1e-6, 1.25)]
    return [{}, *single, *({f.name: draw(f) for f in own} for _ in range(n))]


# --- agreement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [mode for mode in POLICIES if mode != "random_index"])
def test_every_mode_agrees_with_the_oracle(mode: str) -> None:
    compared = 0
    for (case, (s, g)), values in itertools.product(spectra().items(), settings(mode, n=60, seed=1)):
        policy = POLICIES[mode](**values)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = oracle(mode, s, g, asdict(policy))
        if not (expected <= 1e150).all():  # such hyperparameters are refused: see the test of that
            continue
        result = apply(policy, s, g).s_new.numpy()
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=0, err_msg=f"{case}: {policy}")
        compared += 1
    assert compared > 1000


def test_random_index_is_abs_select_on_the_order_that_it_drew() -> None:
    for (_, (s, g)), values in itertools.product(spectra().items(), settings("random_index", n=20, seed=2)):
        policy = RandomIndex(**values)
        edit = apply(policy, s, g)
        ranked = np.ones(len(s))
        ranked[edit.core.numpy()], ranked[edit.noise.numpy()] = 2.0, 0.0
        expected = oracle("abs_select", s, ranked, asdict(policy))
        np.testing.assert_allclose(edit.s_new.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_of_any_dtype_is_edited_in_float64(dtype: torch.dtype) -> None:
    s, g = torch.tensor([3.0, 2.0, 1.0], dtype=dtype), torch.tensor([0.1, -0.7, 0.3], dtype=dtype)
    result = GradientDescent().apply(s, g, "m").s_new
    assert result.dtype == torch.float64
    expected = oracle("gd", s.double().numpy(), g.double().numpy(), asdict(GradientDescent()))
    np.testing.assert_allclose(result, expected, rtol=1e-14)


def test_the_defaults_are_those_of_the_command_line_of_the_method() -> None:
    merged: dict = {}
    for policy in POLICIES.values():
        for key, value in asdict(policy()).items():
            assert merged.setdefault(key, value) == value, f"two defaults for {key}"
    assert merged == {
        "core_frac": 0.2, "noise_frac": 0.2, "amp_factor": 1.25, "sup_factor": 0.80, "mid_factor": 1.0,
        "min_core_k": 1, "smooth_temperature": 0.35, "smooth_center_q": 0.5, "smooth_align_mid": True,
        "z_high": 1.0, "z_low": -0.5, "z_tau": 0.2, "z_fallback_std": 1e-6,
        "robust_z_high": 1.0, "robust_z_low": -0.5, "robust_z_tau": 0.2, "robust_fallback_sigma": 1e-6,
        "eta": 0.2, "update_mode": "multiplicative", "asymmetric_update": False, "eta_suppress": 2.0,
        "eta_enhance": 0.2, "pos_power": 1.0, "grad_norm": "mean_abs", "preserve_energy": "l1",
        "soft_temperature": 0.35, "soft_pivot_mode": "median", "sigma_clip_min": 0.0, "seed": 0,
    }  # fmt: skip
    assert list(POLICIES) == [
        "abs_select",
        "smooth_abs",
        "double_smooth",
        "z_score",
        "robust_z",
        "random_index",
        "gd",
        "spectral_gate",
    ]
    assert all(f.metadata["help"] for policy in POLICIES.values() for f in fields(policy))


# --- worked examples ----------------------------------------------------------------------------------------


def test_abs_select_by_hand() -> None:
    s, g = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([0.1, -9.0, 0.5, 0.01, 0.2])
    edit = apply(AbsSelect(preserve_energy="none"), s, g)
    assert edit.s_new.tolist() == [5.0, 5.0, 3.0, 1.6, 1.0]
    assert edit.core.tolist() == [False, True, False, False, False]
    assert edit.noise.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("r", "values", "counts"),
    [
        (10, {}, (2, 2)),
        (10, {"core_frac": 0.25, "noise_frac": 0.35}, (2, 4)),  # 2.5 -> 2 and 3.5 -> 4: half to even
        (2, {}, (1, 0)),  # round(0.4) = 0, but at least min_core_k
        (4, {"min_core_k": 9}, (4, 0)),
        (4, {"core_frac": 0.0, "min_core_k": 0}, (0, 1)),
        (4, {"core_frac": 0.75, "noise_frac": 1.0}, (3, 1)),
    ],
)
def test_counts_of_core_and_noise(r: int, values: dict, counts: tuple[int, int]) -> None:
    for policy in (AbsSelect(**values), RandomIndex(**values)):
        edit = apply(policy, np.ones(r), np.arange(r, dtype=float))
        assert (edit.stats["k_core"], edit.stats["k_noise"]) == counts
        assert (int(edit.core.sum()), int(edit.noise.sum())) == counts
        assert not (edit.core & edit.noise).any()


def test_ties_go_by_index() -> None:
    edit = apply(AbsSelect(core_frac=0.5, noise_frac=0.25), np.ones(8), np.array([1.0, -1, 1, -1, 1, -1, 1, -1]))
    assert edit.core.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert edit.noise.nonzero().flatten().tolist() == [6, 7]


def test_the_aligned_smooth_gate_is_mid_factor_at_the_median() -> None:
    s, g = np.ones(5), np.array([1.0, 2.0, 3.0, 5.0, 9.0])
    edit = apply(SmoothAbs(preserve_energy="none", mid_factor=0.9), s, g)
    assert edit.s_new[2].item() == pytest.approx(0.9, rel=1e-12)
    unaligned = apply(SmoothAbs(preserve_energy="none", mid_factor=0.9, smooth_align_mid=False), s, g)
    assert unaligned.s_new[2].item() == pytest.approx((1.25 + 0.8) / 2, rel=1e-12)


def test_the_spectral_gate_by_hand() -> None:
    s, g = np.ones(5), np.array([1.0, -2.0, 3.0, 5.0, -9.0])  # |g| rescaled: 0, 1/8, 1/4, 1/2, 1
    for pivot, center in {"median": 1 / 4, "mean": 3 / 8, "min": 0.0, "max": 1.0}.items():
        edit = apply(SpectralGate(soft_pivot_mode=pivot, soft_temperature=0.5, preserve_energy="none"), s, g)
        share = 1 / (1 + np.exp(-(np.array([0, 1 / 8, 1 / 4, 1 / 2, 1]) - center) / 0.5))
        np.testing.assert_allclose(edit.s_new, 0.8 + 0.45 * share, rtol=1e-12)
        assert edit.stats["pivot"] == pytest.approx(center)
        assert (edit.core.sum(), edit.noise.sum()) == {"median": (2, 2), "mean": (2, 3), "min": (4, 0), "max": (0, 4)}[
            pivot
        ]


def test_descent_lowers_where_the_gradient_is_positive() -> None:
    edit = apply(GradientDescent(preserve_energy="none"), np.ones(2), np.array([1.0, -1.0]))
    np.testing.assert_allclose(edit.s_new, [math.exp(-0.2), math.exp(0.2)], rtol=1e-15)
    assert (edit.core.tolist(), edit.noise.tolist()) == ([False, True], [True, False])
    asymmetric = GradientDescent(
        preserve_energy="none",
        update_mode="additive",
        asymmetric_update=True,
        grad_norm="none",
        pos_power=2.0,
    )
    np.testing.assert_allclose(apply(asymmetric, np.array([20.0, 1.0]), np.array([3.0, -1.0])).s_new, [2.0, 1.2])


def test_clip_comes_before_energy() -> None:
    s, g = np.array([3.0, 1.0]), np.array([-1.0, 1.0])
    policy = GradientDescent(eta=2.0, update_mode="additive", sigma_clip_min=1.0)
    np.testing.assert_allclose(apply(policy, s, g).s_new, np.array([5.0, 1.0]) * 4 / 6, rtol=1e-15)


# --- properties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize(("energy", "order"), [("l1", 1), ("l2", 2)])
def test_energy_is_preserved(mode: str, energy: str, order: int) -> None:
    for r in (3, 16, 64):
        s, g = spectra()[f"random {r}"]
        new = apply(POLICIES[mode](preserve_energy=energy), s, g).s_new.numpy()
        assert np.linalg.norm(new, order) == pytest.approx(np.linalg.norm(s, order), rel=1e-13)
        assert not np.allclose(new, s, rtol=1e-3)


@pytest.mark.parametrize("mode", GATE_MODES)
@pytest.mark.parametrize("energy", ["none", "l1", "l2"])
def test_factors_of_one_leave_s_alone(mode: str, energy: str) -> None:
    policy = POLICIES[mode](amp_factor=1.0, sup_factor=1.0, mid_factor=1.0, preserve_energy=energy)
    for s, g in spectra().values():
        np.testing.assert_array_equal(apply(policy, s, g).s_new.numpy(), s)


def test_a_zero_gradient_stops_descent() -> None:
    for values in ({}, {"update_mode": "additive"}, {"asymmetric_update": True}):
        s = spectra()["random 16"][0]
        np.testing.assert_array_equal(apply(GradientDescent(**values), s, np.zeros(16)).s_new.numpy(), s)


@pytest.mark.parametrize("mode", ["z_score", "robust_z"])
def test_a_flat_g_leaves_s_alone_whatever_mid_factor_is(mode: str) -> None:
    s = spectra()["random 16"][0]
    edit = apply(POLICIES[mode](mid_factor=0.5, preserve_energy="none"), s, np.full(16, 0.3))
    np.testing.assert_array_equal(edit.s_new.numpy(), s)
    assert edit.stats["fallback"] is True
    assert not edit.core.any()
    assert not edit.noise.any()


@pytest.mark.parametrize("grad_norm", ["none", "mean_abs", "l2"])
def test_abs_select_does_not_see_the_scale_or_sign_of_g(grad_norm: str) -> None:
    policy = AbsSelect(grad_norm=grad_norm)
    for case in ("random 17", "random 64", "ties", "wide g", "close g"):
        s, g = spectra()[case]
        expected = apply(policy, s, g).s_new
        for scale in (1e-20, 0.5, -1.0, 1e20):
            assert torch.equal(apply(policy, s, g * scale).s_new, expected), (case, scale)


@pytest.mark.parametrize("mode", [mode for mode in POLICIES if mode != "random_index"])
def test_permuted_directions_are_edited_alike(mode: str) -> None:
    s, g = spectra()["random 17"]
    order = np.random.default_rng(3).permutation(17)
    straight, permuted = apply(POLICIES[mode](), s, g), apply(POLICIES[mode](), s[order], g[order])
    np.testing.assert_allclose(permuted.s_new, straight.s_new[order], rtol=1e-13)
    assert torch.equal(permuted.core, straight.core[order])


@pytest.mark.parametrize("mode", [*GATE_MODES[2:], "abs_select"])
def test_core_is_where_g_is_large_and_noise_where_it_is_small(mode: str) -> None:
    g = spectra()["random 64"][1]
    edit = apply(POLICIES[mode](preserve_energy="none"), np.ones(64), g)
    size, gate = np.abs(g), edit.s_new.numpy()
    core, noise = edit.core.numpy(), edit.noise.numpy()
    assert 0 < core.sum() < 32
    assert 0 < noise.sum() < 40
    assert size[core].min() > size[~core & ~noise].max() > size[~core & ~noise].min() > size[noise].max()
    assert gate[core].min() > gate[~core & ~noise].max()
    assert gate[noise].max() < gate[~core & ~noise].min()
    assert ((gate >= 0.8) & (gate <= 1.25)).all()


# --- random_index and control -------------------------------------------------------------------------------


def test_random_index_depends_on_seed_and_name_and_not_on_order() -> None:
    s = np.linspace(2, 1, 64)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(6)]

    def draw(seed: int, order: list[str]) -> dict[str, tuple]:
        policy = RandomIndex(seed=seed)
        return {name: tuple(apply(policy, s, None, name).core.tolist()) for name in order}

    torch.manual_seed(5)
    first = draw(0, names)
    torch.manual_seed(6)
    assert draw(0, names[::-1]) == first
    assert len(set(first.values())) == len(names)
    assert all(draw(1, names)[name] != first[name] for name in names)


def test_random_index_neither_uses_nor_disturbs_the_global_generator() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    apply(RandomIndex(), np.ones(8), None)
    assert torch.equal(torch.rand(3), expected)


def test_random_index_draws_every_direction_alike() -> None:
    n, r = 4000, 10
    edits = [apply(RandomIndex(seed=seed), np.ones(r), None) for seed in range(n)]
    for masks in ([e.core for e in edits], [e.noise for e in edits]):
        rate = torch.stack(masks).double().mean(0)
        assert ((rate - 0.2).abs() < 5 * math.sqrt(0.2 * 0.8 / n)).all()  # five standard errors


def test_the_control_shares_all_that_random_index_has() -> None:
    factors = {"amp_factor": 2.0, "sup_factor": 0.1, "mid_factor": 0.9}
    policy = AbsSelect(core_frac=0.3, noise_frac=0.1, min_core_k=3, preserve_energy="l2", **factors)
    control = matched_control(policy, 4)
    assert type(control) is RandomIndex
    assert asdict(control) == asdict(policy) | {"seed": 4}
    s, g = spectra()["random 64"]
    edit, random = apply(policy, s, g), apply(control, s, g)
    assert (edit.stats["k_core"], edit.stats["k_noise"]) == (random.stats["k_core"], random.stats["k_noise"])
    assert not torch.equal(edit.core, random.core)
    assert matched_control(POLICIES["gd"](preserve_energy="none"), 1) == RandomIndex(preserve_energy="none", seed=1)
    assert matched_control(POLICIES["z_score"](amp_factor=1.5), 1) == RandomIndex(amp_factor=1.5, seed=1)
    assert matched_control(RandomIndex(seed=1, core_frac=0.5), 2) == RandomIndex(seed=2, core_frac=0.5)


# --- statistics ---------------------------------------------------------------------------------------------

COMMON = {"r", "mode", "k_core", "k_noise"} | {"g_abs_mean", "g_abs_max"}
COMMON |= {"sigma0_sum", "sigma_new_sum", "sigma0_top1", "sigma_new_top1"}
FACTORS = {"amp_factor", "sup_factor", "mid_factor"}
EXTENT = {"gate_min", "gate_max"}
Z = {"z_high", "z_low", "tau", "k_core_eff", "k_noise_eff", "frac_core", "frac_noise", "fallback"} | EXTENT


@pytest.mark.parametrize(
    ("mode", "own"),
    [
        ("abs_select", FACTORS),
        ("random_index", FACTORS),
        (
            "smooth_abs",
            {"q_lo", "q_hi", "center_q", "lo", "hi", "center", "mu", "tau", "degenerate"} | EXTENT,
        ),
        ("double_smooth", {"threshold_noise", "threshold_core", "tau"} | EXTENT),
        ("z_score", {"mu", "std"} | Z),
        ("robust_z", {"median", "mad", "sigma_robust"} | Z),
        ("gd", set()),
        ("spectral_gate", {"pivot", "tau"} | EXTENT),
    ],
)
def test_statistics_have_the_keys_of_the_method_and_are_json(mode: str, own: set[str]) -> None:
    for case in ("random 16", "constant g", "zero g", "zero s", "rank 1"):
        s, g = spectra()[case]
        edit = apply(POLICIES[mode](), s, g)
        stats = json.loads(json.dumps(edit.stats, allow_nan=False))
        assert set(stats) == COMMON | own
        assert (stats["r"], stats["mode"]) == (len(s), mode)
        assert stats["g_abs_mean"] == pytest.approx(np.abs(g).mean(), rel=1e-12)
        assert stats["g_abs_max"] == np.abs(g).max()
        assert stats["sigma0_sum"] == pytest.approx(s.sum(), rel=1e-12)
        assert stats["sigma0_top1"] == s.max()
        assert stats["sigma_new_sum"] == pytest.approx(edit.s_new.sum().item())
        assert stats["sigma_new_top1"] == edit.s_new.max().item()
        assert (stats["k_core"] is None) == (mode not in ("abs_select", "random_index"))


@pytest.mark.parametrize(("mode", "prefix"), [("z_score", "z"), ("robust_z", "robust_z")])
def test_z_statistics_by_hand(mode: str, prefix: str) -> None:
    g = np.array([1.0, 2.0, 3.0, 4.0, 10.0, 4.0])  # mean 4, lower median 3; |g - 3| = 2 1 0 1 7 1, MAD 1
    values = {f"{prefix}_high": 0.9, f"{prefix}_low": -0.7, "grad_norm": "none", "preserve_energy": "none"}
    stats = apply(POLICIES[mode](**values), np.ones(6), g).stats
    assert (stats["z_high"], stats["z_low"], stats["tau"], stats["fallback"]) == (0.9, -0.7, 0.2, False)
    if mode == "z_score":
        assert (stats["mu"], stats["std"]) == (4.0, pytest.approx(math.sqrt((9 + 4 + 1 + 0 + 36 + 0) / 6)))
        assert (stats["k_core_eff"], stats["k_noise_eff"]) == (1, 1)
    else:
        assert (stats["median"], stats["mad"], stats["sigma_robust"]) == (3.0, 1.0, 1.4826)
        assert (stats["k_core_eff"], stats["k_noise_eff"]) == (1, 1)
    assert (stats["frac_core"], stats["frac_noise"]) == (1 / 6, 1 / 6)


def test_smooth_statistics_by_hand() -> None:
    g = np.array([1.0, 2.0, 3.0, 4.0, 10.0])  # quantiles at 0.25 and 0.75 are 2 and 4
    common = {"noise_frac": 0.25, "core_frac": 0.25, "grad_norm": "none", "preserve_energy": "none"}
    edit = apply(SmoothAbs(smooth_center_q=0.25, smooth_align_mid=False, **common), np.ones(5), g)
    expected = {
        "q_lo": 0.25,
        "q_hi": 0.75,
        "center_q": 0.25,
        "lo": 2.0,
        "hi": 4.0,
        "center": 2.0,
        "mu": 2.0,
        "tau": 0.7,
    }
    assert {key: edit.stats[key] for key in expected} == expected
    assert edit.stats["degenerate"] is False
    masks = [False, False, False, False, True], [True, False, False, False, False]  # the quantiles are in neither
    assert (edit.core.tolist(), edit.noise.tolist()) == masks
    assert (edit.stats["gate_min"], edit.stats["gate_max"]) == (edit.s_new.min().item(), edit.s_new.max().item())
    edit = apply(POLICIES["double_smooth"](smooth_temperature=0.5, **common), np.ones(5), g)
    assert [edit.stats[key] for key in ("threshold_noise", "threshold_core", "tau")] == [2.0, 4.0, 4.5]
    assert (edit.core.tolist(), edit.noise.tolist()) == masks
    assert apply(SmoothAbs(), np.ones(3), np.ones(3)).stats["degenerate"] is True


def test_without_g_its_statistics_are_null() -> None:
    stats = apply(RandomIndex(), np.ones(4), None).stats
    assert stats["g_abs_mean"] is None
    assert stats["g_abs_max"] is None

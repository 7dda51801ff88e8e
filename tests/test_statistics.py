"""Standard errors, the bootstrap of the choice and the agreement of choices, by hand and by simulation."""

from __future__ import annotations

import json
import math

import pytest
import torch

from spectral_fast.policies import POLICIES, AbsSelect, hard_choice
from spectral_fast.statistics import Stability, agreement, as_text, bootstrap, doubling, signal, standard_error

ONE_EACH = AbsSelect(core_frac=0.25, noise_frac=0.25)  # of r = 4: one core and one noise direction


def parts(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def noisy(
    signal: float, *, modules: int = 40, n: int = 32, r: int = 64, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Samples, and their expected sum: true g ~ N(0, signal²) times the standard error of g, which is 1 per √n."""
    generator = torch.Generator().manual_seed(seed)
    truth = {f"m{i}": signal * n**0.5 * torch.randn(r, generator=generator) for i in range(modules)}
    return {name: g / n + torch.randn(n, r, generator=generator) for name, g in truth.items()}, truth


def test_the_standard_error_is_that_of_a_sum() -> None:
    # Deviations of 1, 2, 6 from their mean 3 are -2, -1, 3: sqrt(3/2 · 14) = sqrt(21).
    got = standard_error(parts([1, 5], [2, 5], [6, 5]))
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([math.sqrt(21), 0.0])


def test_the_standard_error_of_one_sample_is_unknown() -> None:
    assert standard_error(parts([1, 2])).isnan().all()


def test_the_standard_error_is_the_spread_of_repeated_calibrations() -> None:
    n, repeats = 16, 4000
    scales = torch.tensor([0.1, 1.0, 7.0])
    samples = 3.0 + scales * torch.randn(repeats, n, 3, generator=torch.Generator().manual_seed(1))
    spread = samples.double().sum(1).std(0)
    found = torch.stack([standard_error(each).square() for each in samples]).mean(0).sqrt()
    # The relative standard error of a standard deviation from N values is 1/sqrt(2 N); five of them.
    torch.testing.assert_close(found, spread, rtol=5 / math.sqrt(2 * repeats), atol=0.0)
    torch.testing.assert_close(spread, (scales * n**0.5).double(), rtol=5 / math.sqrt(2 * repeats), atol=0.0)


def test_the_bootstrap_of_two_samples_draws_one_of_them() -> None:
    # Sample 1 alone: |g| = 4 3 2 1, core 0, noise 3. Sample 2 alone: 1 2 3 4, core 3, noise 0.
    found = bootstrap({"m": parts([4, 3, 2, 1], [-1, 2, 3, 4])}, ONE_EACH, resamples=4000)["m"]
    assert found.core.tolist() == pytest.approx([0.5, 0, 0, 0.5], abs=5 * math.sqrt(0.25 / 4000))
    assert found.noise.tolist() == [found.core[3], 0, 0, found.core[0]]


def test_the_bootstrap_uses_the_sum_not_the_sizes_of_the_parts() -> None:
    cancelling = [5.0, 1.0, 0.6, 0.1]
    found = bootstrap({"m": parts(cancelling, [-5, 1, 0.6, 0.1], cancelling, [-5, 1, 0.6, 0.1])}, ONE_EACH)["m"]
    # Three draws of ±5 never cancel, two or four would.
    assert found.core.tolist() == [1, 0, 0, 0]
    found = bootstrap({"m": parts(*[[5, 1, 0.6, 0.1], [-5, 1, 0.6, 0.1]] * 2, [0, 1, 0.6, 0.1])}, ONE_EACH)["m"]
    assert 0 < found.core[1] < 1
    assert 0 < found.noise[0] < 1


def test_the_bootstrap_chooses_as_the_policy_does() -> None:
    """Equal samples leave nothing to chance, so the probabilities are the policy's own masks, ties included."""
    g = torch.tensor([0.5, -2.0, 2.0, 0.0, 0.1, 0.0, 1.0, -0.1])
    for choice in (AbsSelect(), AbsSelect(core_frac=0.4, noise_frac=0.4, min_core_k=2), AbsSelect(core_frac=1.0)):
        edit = choice.apply(torch.ones(8), g, "m")
        found = bootstrap({"m": g.expand(5, 8)}, choice, resamples=3)["m"]
        assert torch.equal(found.core.bool(), edit.core)
        assert torch.equal(found.noise.bool(), edit.noise)


def test_all_modules_are_resampled_alike() -> None:
    samples = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = bootstrap({"a": samples, "b": 2 * samples, "c": -samples}, ONE_EACH)
    assert torch.equal(found["a"].core, found["b"].core)
    assert torch.equal(found["a"].core, found["c"].core)


def test_the_bootstrap_is_repeatable_and_depends_on_its_seed() -> None:
    samples, _ = noisy(1.0, modules=1)
    assert torch.equal(bootstrap(samples)["m0"].core, bootstrap(samples)["m0"].core)
    assert not torch.equal(bootstrap(samples)["m0"].core, bootstrap(samples, seed=1)["m0"].core)


def test_bootstrap_probabilities_are_how_often_the_choice_is_right() -> None:
    """Within 0.1 where g is eight standard errors, which leaves room for luck and for 150 directions per bin."""
    samples, truth = noisy(8.0)
    right = {name: AbsSelect().choose(g) for name, g in truth.items()}
    for role in (0, 1):
        probability = torch.cat([members[role] for members in bootstrap(samples).values()])
        is_so = torch.cat([right[name][role] for name in samples]).double()
        for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 0.95), (0.95, 1.0)):
            chosen = (probability > low) & (probability <= high)
            assert chosen.sum() >= 80
            assert is_so[chosen].mean().item() == pytest.approx(probability[chosen].mean().item(), abs=0.1)


def test_without_signal_the_bootstrap_is_certain_of_nearly_nothing() -> None:
    core, noise = Stability.of(noisy(0.0)[0]).certain()
    assert core is not None
    assert core < 0.02
    assert noise == 0


def test_agreement_by_hand() -> None:
    samples = {"m": parts([4, 3, 2, 1], [0, 0, 9, 0], [0, 9, 0, 0], [0, 0, 0, 5])}
    # |g| of the first 1, 2, 3, 4 samples: 4321, 4 3 11 1, 4 12 11 1, 4 12 11 6; core 0 2 1 1, noise 3 3 3 0.
    found = {entry.samples: entry for entry in agreement(samples, ONE_EACH, sizes=[2, 3, 4])}
    assert [found[m].doubling for m in (2, 3, 4)] == [0.5, 0.5, 0.0]
    assert [found[m].whole for m in (2, 3, 4)] == [0.0, 0.5, 1.0]
    assert found[2].halves == 0.5  # sample 1: core 0, noise 3; sample 2: core 2, noise 3 by the tie
    assert doubling(samples, ONE_EACH) == 0.0


def test_agreement_weighs_modules_by_how_much_is_chosen_in_them() -> None:
    same, swapped = torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4]), torch.tensor([3.0, 2.0, 1.0, 4.0])
    # Two core and two noise directions that stay, one of each that do not: 4 of 6.
    samples = {"a": torch.stack([same, same]), "b": torch.stack([swapped, torch.tensor([9.0, 2, 9, -4])])}
    samples["b"][1] = torch.tensor([-3.0, 2, 9, -4])
    [entry] = agreement(samples, ONE_EACH)
    assert entry.doubling == pytest.approx(4 / 6)


def test_two_halves_share_no_sample() -> None:
    """Each sample has a direction of its own, so halves that shared one would agree."""
    [*_, entry] = agreement({"m": torch.eye(8)}, AbsSelect(core_frac=0.5, noise_frac=0.0))
    assert (entry.samples, entry.halves) == (8, 0.0)
    assert entry.doubling > 0


def test_without_signal_two_halves_agree_by_chance() -> None:
    samples, _ = noisy(0.0)
    last = agreement(samples)[-1]
    # 13 of 64 core and 13 noise: 13/64 of either by chance. The mean over 40 modules and 20 splits that overlap half.
    assert last.halves == pytest.approx(13 / 64, abs=0.02)
    assert last.halves_by_chance == pytest.approx(13 / 64, abs=0.02)
    assert last.doubling == pytest.approx(0.38, abs=0.03)  # as the docstring says
    assert last.doubling_by_chance == pytest.approx(0.38, abs=0.03)


def test_directions_that_only_differ_in_spread_agree_no_more_than_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 1, 64)
    samples = {f"m{i}": spread * torch.randn(64, 64, generator=generator) for i in range(40)}
    last = agreement(samples)[-1]
    assert last.halves > 0.4
    assert last.halves == pytest.approx(last.halves_by_chance, abs=0.03)


def test_agreement_grows_with_the_signal_and_with_the_samples() -> None:
    weak, strong = (agreement(noisy(signal)[0]) for signal in (2.0, 16.0))
    assert strong[-1].doubling > weak[-1].doubling + 0.2 > weak[-1].doubling_by_chance + 0.3
    assert strong[-1].halves > weak[-1].halves + 0.3
    assert strong[-1].halves_by_chance + 0.3 < strong[-1].halves < strong[-1].doubling
    assert [entry.samples for entry in strong] == [4, 6, 8, 11, 16, 23, 32]
    assert strong[-1].halves > strong[2].halves + 0.1
    assert strong[-1].whole == 1.0


def test_doubling_is_the_agreement_of_all_samples() -> None:
    samples, _ = noisy(1.0, n=13)
    assert doubling(samples) == agreement(samples)[-1].doubling


def test_the_p_value_of_the_signal_by_hand() -> None:
    # g² / Σ c² of both signs alike is 16 / 10, of opposite ones 4 / 10: half of the draws are as large as what is seen.
    assert signal({"m": parts([1.0], [3.0])}, draws=4000) == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / 4000))
    assert signal({"m": parts([1.0], [-3.0])}) == 1.0
    assert signal({"m": torch.ones(20, 3), "dead": torch.zeros(20, 2)}) == 1 / 1000
    assert signal({"m": 1e-200 * torch.ones(20, 3, dtype=torch.float64)}) == 1 / 1000
    assert signal({"m": torch.zeros(4, 3)}) == 1.0


def test_the_p_value_is_uniform_without_signal_and_small_with_it() -> None:
    without = torch.tensor([signal(noisy(0.0, modules=3, r=16, seed=seed)[0], draws=99) for seed in range(200)])
    for level in (0.05, 0.25, 0.5):
        assert (without <= level).double().mean().item() == pytest.approx(
            level, abs=4 * math.sqrt(level * (1 - level) / 200)
        )
    assert signal(noisy(1.0)[0]) == 1 / 1000


def test_a_calibration_without_signal_is_warned_of() -> None:
    assert "warning: these samples do not show" in as_text(Stability.of(noisy(0.0)[0]).summary())
    assert "warning" not in as_text(Stability.of(noisy(1.0)[0]).summary())


def test_a_single_sample_tells_nothing() -> None:
    samples = {"m": parts([1, 2, 3, 4])}
    assert bootstrap(samples)["m"].core.isnan().all()
    assert agreement(samples) == []
    assert math.isnan(doubling(samples))
    summary = Stability.of(samples).summary()
    assert summary["core_certain"] is None
    assert "single sample" in as_text(summary)


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 3\] samples"):
        bootstrap({"a": torch.ones(2, 4), "b": torch.ones(3, 4)})
    with pytest.raises(ValueError, match=r"got \[0\] samples"):
        agreement({"a": torch.ones(0, 4)})
    with pytest.raises(ValueError, match="sizes from 2 to the 3 samples that there are; got 4"):
        agreement({"a": torch.ones(3, 4)}, sizes=[2, 4])


def test_odd_modules_are_no_obstacle() -> None:
    samples = {"none": torch.zeros(4, 0), "one": torch.ones(4, 1), "dead": torch.zeros(4, 8)}
    stability = Stability.of(samples)
    assert stability.membership["one"].core.tolist() == [1.0]
    assert stability.summary()["core_certain"] == 1.0
    nothing = Stability.of(samples, AbsSelect(core_frac=0.0, noise_frac=0.0, min_core_k=0))
    assert nothing.summary()["core_certain"] is None
    assert nothing.agreement[-1].doubling == 1.0


def test_the_summary_and_its_line_have_the_numbers() -> None:
    stability = Stability.of(noisy(8.0, modules=5)[0])
    summary = json.loads(json.dumps(stability.summary(), allow_nan=False))
    chosen = [AbsSelect().choose(samples.sum(0)) for samples in stability.samples.values()]
    certain = [
        members.core[core] > 0.95 for members, (core, _) in zip(stability.membership.values(), chosen, strict=True)
    ]
    assert summary["core_certain"] == pytest.approx(torch.cat(certain).double().mean().item())
    assert summary["agreement"][-1]["samples"] == summary["samples"] == 32
    text = as_text(summary)
    assert f"core directions certain (bootstrap > 0.95): {summary['core_certain']:.0%}" in text
    assert f"doubling the samples to 32 changed {1 - summary['agreement'][-1]['doubling']:.0%} of the choice" in text


@pytest.mark.parametrize("mode", sorted(POLICIES))
def test_every_policy_has_a_choice_with_its_own_fractions(mode: str) -> None:
    policy = POLICIES[mode]()
    own = {"core_frac": 0.5} if hasattr(policy, "core_frac") else {}
    assert hard_choice(POLICIES[mode](**own)) == AbsSelect(**own)


def test_all_resamples_of_many_modules_are_chosen_from_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, numbers = AbsSelect.choose, []

    def counted(choice: AbsSelect, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers.append(g.numel())
        return choose(choice, g)

    monkeypatch.setattr(AbsSelect, "choose", counted)
    bootstrap(noisy(0.0, modules=560)[0])
    assert sum(numbers) == 560 * 1000 * 64
    assert len(numbers) == 35  # a million numbers each: one by one 560,000 modules would take minutes

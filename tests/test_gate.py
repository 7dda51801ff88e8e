"""Gates: what they see of a micro-batch, how they decide, how acceptance is held, and that they go on from a state."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_fast.training import HeadGradientGate
from spectral_fast.training.gate import KINDS, Gate, LossFloor, LossFloorGate, NoveltyAndLossGate, RandomControl, source
from spectral_fast.training.gate import open_gate as opened

H, V = 24, 40
SIGMAS = 5


def batch(seed: int = 0, shape: tuple[int, ...] = (2, 6)) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, logits of some head, and labels of which some are missing."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, H, generator=generator)
    logits = 3 * torch.randn(*shape, V, generator=generator)
    labels = torch.randint(V, shape, generator=generator)
    labels[..., 1] = -100
    return hidden, logits, labels


def gradient(hidden: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Of the summed loss with respect to a head's weight, by autograd; labels are aligned."""
    weight = torch.zeros(V, H, requires_grad=True)
    scores = logits.flatten(0, -2) + hidden.flatten(0, -2) @ weight.mT
    torch.nn.functional.cross_entropy(scores, labels.flatten(), ignore_index=-100, reduction="sum").backward()
    assert weight.grad is not None
    return weight.grad


def gate(**more: Any) -> HeadGradientGate:
    return HeadGradientGate(H, V, **{"m": 64, "k": 8, "burn_in": 4, "k_topk": V, "shift_labels": False, **more})


def unscaled(seed: int, *of: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Sketches before they are scaled to length 1."""
    from spectral_fast.kernels.head_sketch import head_sketch

    hashes = gate(seed=seed).hashes
    return [head_sketch(h.flatten(0, 1), s.flatten(0, 1), y.flatten(), hashes, V).double() for h, s, y in of]


def test_inner_products_of_sketches_are_on_average_those_of_the_gradients() -> None:
    first, other = batch(), batch(1)
    other = first[0] + other[0], other[1], first[2]  # so that the gradients are not nearly orthogonal
    one, two = gradient(*first).double(), gradient(*other).double()
    drawn = torch.tensor(
        [[float(a @ b), float(a @ a)] for a, b in (unscaled(2 * s, first, other) for s in range(3000))]
    )
    wanted = torch.stack([(one * two).sum(), one.square().sum()]).float()
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - wanted).abs() <= SIGMAS * error).all()
    assert (error <= 0.03 * wanted.abs()).all()  # so that a sketch that is off by a sixth would be seen


def test_a_sketch_has_length_1_and_labels_are_shifted_unless_they_are_aligned() -> None:
    hidden, logits, labels = batch()
    z = gate().embed(hidden, logits, labels)
    assert (z.shape, z.dtype) == ((64,), torch.float32)
    assert float(z.norm()) == pytest.approx(1, abs=1e-6)
    shifted = gate(shift_labels=True).embed(hidden, logits, labels)
    cut = gate().embed(hidden[:, :-1].flatten(0, 1), logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(shifted, cut)
    assert not torch.allclose(shifted, z)
    one = gate(shift_labels=True)
    torch.testing.assert_close(
        one.embed(hidden[0], logits[0], labels[0]), one.embed(hidden[:1], logits[:1], labels[:1])
    )


def test_logits_may_be_left_to_the_heads_weight() -> None:
    hidden, _, labels = batch()
    weight, bias = batch(3)[0].flatten(0, 1).repeat(4, 1)[:V], batch(4)[1][0, 0]
    made = gate(k_topk=5, shift_labels=True)
    torch.testing.assert_close(
        made.embed_from_weight(hidden, weight, labels, bias), made.embed(hidden, hidden @ weight.mT + bias, labels)
    )


def test_novelty_is_what_no_accepted_micro_batch_had() -> None:
    made = gate()
    first, other = (made.embed(*batch(seed)) for seed in (0, 1))
    assert made.novelty(first) == 1
    made.update(first)
    assert made.novelty(first) == pytest.approx(0, abs=1e-6)
    assert made.novelty(other) == pytest.approx(1 - float(first @ other) ** 2, abs=1e-6)
    assert made.last_novelty == made.metrics()["novelty"]
    hidden, logits, labels = batch()
    nothing = made.embed(hidden, logits, torch.full_like(labels, -100))
    assert not nothing.any()
    assert made.novelty(nothing) == 0


def test_all_is_accepted_in_the_burn_in_and_nothing_drawn() -> None:
    made, state = gate(), gate().generator.get_state()
    for _ in range(4):
        assert made.accept(0.0)
        made.step()
    assert torch.equal(made.generator.get_state(), state)
    assert made.tau == 0.3
    accepted = sum(made.accept(0.42) for _ in range(4000))
    wanted = 1 / (1 + math.exp(-10 * (0.42 - made.tau)))
    assert abs(accepted / 4000 - wanted) <= SIGMAS * math.sqrt(wanted * (1 - wanted) / 4000)
    assert not torch.equal(made.generator.get_state(), state)


def run(made: HeadGradientGate, steps: int, novelty: Callable[[int], float]) -> list[bool]:
    accepted = []
    for i in range(steps):
        accepted.append(made.accept(novelty(i)))
        made.accepted_count += accepted[-1]
        made.step()
    return accepted


@pytest.mark.parametrize("novelty", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("target", [0.3, 0.4])
def test_the_controller_settles_within_2_points_of_its_target(novelty: float, target: float) -> None:
    made, noise = gate(burn_in=100, target_novelty=target), torch.Generator().manual_seed(3)
    accepted = run(
        made, 6000, lambda i: novelty + 0.1 * math.sin(i / 500) + 0.1 * float(torch.randn((), generator=noise))
    )
    assert abs(sum(accepted[1000:]) / 5000 - target) <= 0.02
    assert 0 <= made.tau <= 1


def test_the_threshold_stays_within_0_and_1() -> None:
    made = gate(burn_in=0, novelty_ema_rate=0.5)
    run(made, 100, lambda _: 5.0)
    assert made.tau == 1
    run(made, 100, lambda _: -5.0)
    assert made.tau == 0


def test_the_sources_controller_runs_away() -> None:
    made = gate(burn_in=100, compat="source")
    accepted = run(made, 20_000, lambda _: 0.5)
    assert made.tau < -100
    assert all(accepted[-10_000:])
    assert made.acceptance_rate() > 0.99


def test_counters_and_reset() -> None:
    made = gate()
    assert made.acceptance_rate() == 1
    z = made.embed(*batch())
    made.update(z)
    made.step()
    made.step()
    assert (made.step_count, made.accepted_count, made.acceptance_rate()) == (2, 1, 0.5)
    for _ in range(20):
        made.step()
    tau = made.tau
    assert tau != 0.3
    made.reset()
    assert (made.step_count, made.accepted_count, made.tau, made.novelty(z)) == (0, 0, tau, 1)


def test_the_sources_sketch_counts_a_label_among_the_largest_twice() -> None:
    hidden, logits, labels = batch()
    labels[0, 0] = logits[0, 0].argmax()
    made = gate(compat="source", k_topk=5, m=V * H)
    assert (made.sketch.mode, made.shift_labels) == ("orthonormal", False)
    z = source.head_sketch(hidden.flatten(0, 1), logits.flatten(0, 1), labels.flatten(), made.hashes, 5)
    wanted = torch.zeros(made.sketch.m)
    b_h, b_e, s_h, s_e = (
        x.tolist() for x in (made.hashes.bucket_h, made.hashes.bucket_e, made.hashes.sign_h, made.hashes.sign_e)
    )
    for h, scores, gold in zip(hidden.flatten(0, 1), logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if gold < 0:
            continue
        ids = [*scores.topk(5).indices.tolist(), gold]
        for i, p in zip(ids, scores[ids].softmax(0).tolist(), strict=True):
            for j in range(H):
                wanted[(b_h[j] + b_e[i]) % len(wanted)] += s_h[j] * s_e[i] * float(h[j]) * (p - (i == gold))
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.embed(hidden, logits, labels), z / z.norm(), rtol=1e-4, atol=1e-6)


def test_a_loss_floor_lets_the_wanted_share_pass_of_losses_that_fall() -> None:
    made, noise = LossFloorGate(0.3, burn_in=50), torch.Generator().manual_seed(0)
    accepted = []
    for i in range(3000):
        loss = 2 * math.exp(-i / 800) + 0.2 * float(torch.randn((), generator=noise).exp())
        accepted.append(made.decide(loss, *batch()))
        if accepted[-1]:
            made.accepted()
        made.stepped()
    assert all(accepted[:50])
    assert abs(sum(accepted[100:]) / 2900 - 0.3) <= 0.02
    assert made.acceptance_rate() == sum(accepted) / 3000
    floor = made.metrics()["loss_floor"]
    made.decide(math.nan, *batch())
    made.stepped()
    assert made.metrics()["loss_floor"] == floor


def test_a_random_control_accepts_its_share_whatever_it_is_shown() -> None:
    made = RandomControl(0.3, seed=1)
    accepted = []
    for _ in range(4000):
        accepted.append(made.decide(0.0, *batch()))
        made.stepped()
    assert abs(sum(accepted) / 4000 - 0.3) <= SIGMAS * math.sqrt(0.21 / 4000)


def test_both_gates_together_accept_the_wanted_share_and_nothing_below_the_floor() -> None:
    made = opened("both", H, V, target_novelty=0.3, burn_in=20, seed=0, m=64, k=8, k_topk=8, novelty_ema_rate=0.03)
    assert isinstance(made, NoveltyAndLossGate)
    assert made.floor.quantile == pytest.approx(1 - math.sqrt(0.3))
    noise, accepted = torch.Generator().manual_seed(0), []
    for i in range(1500):
        loss, floor = 1 + float(torch.rand((), generator=noise)), made.metrics()["loss_floor"]
        accepted.append(made.decide(loss, *batch(i, (1, 3))))
        if accepted[-1]:
            assert i < 20 or loss > floor
            made.accepted()
        made.stepped()
    assert abs(sum(accepted[500:]) / 1000 - 0.3) <= 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_goes_on_from_its_state_bit_for_bit(kind: str) -> None:
    def made() -> Gate:
        own = {"m": 64, "k": 8, "k_topk": 8} if kind in ("novelty", "both") else {}
        return opened(kind, H, V, target_novelty=0.5, burn_in=3, seed=7, **own)

    def go(on: Gate, steps: range) -> list[bool]:
        found = []
        for i in steps:
            found.append(on.decide(1 + math.sin(i), *batch(i)))
            if found[-1]:
                on.accepted()
            on.stepped()
        return found

    whole, begun, later = made(), made(), made()
    decisions = go(whole, range(40))
    go(begun, range(15))
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    later.load_state_dict(torch.load(file, weights_only=True))
    assert go(later, range(15, 40)) == decisions[15:]
    assert 0 < sum(decisions[15:]) < 25
    assert str(later.state_dict()) == str(whole.state_dict())


def test_ranks_that_share_their_means_decide_the_same() -> None:
    made = {"m": 64, "k": 8, "k_topk": 8, "target_novelty": 0.5, "burn_in": 2, "seed": 1}
    ranks = [NoveltyAndLossGate(H, V, **made) for _ in range(2)]
    decisions: list[tuple[bool, ...]] = []
    for i in range(40):
        given = [(1 + math.sin(i + r), *batch(2 * i + r)) for r in range(2)]
        shown = [torch.cat([torch.tensor([loss]), ranks[0].embed(*own)]) for loss, *own in given]
        mean = torch.stack(shown).mean(0)
        decisions.append(
            tuple(rank.decide(*own, lambda _, mean=mean: mean) for rank, own in zip(ranks, given, strict=True))
        )
        for rank in ranks:
            if decisions[-1][0]:
                rank.accepted()
            rank.stepped()
    assert all(a == b for a, b in decisions)
    assert 5 < sum(a for a, _ in decisions) < 35
    assert torch.equal(ranks[0].sketch.basis, ranks[1].sketch.basis)


@pytest.mark.parametrize("kind", [HeadGradientGate, NoveltyAndLossGate])
def test_the_mean_of_the_ranks_sketches_is_scaled_to_length_1(kind: type[HeadGradientGate]) -> None:
    made = kind(H, V, m=64, k=8, k_topk=V, burn_in=9)
    made.update(made.embed(*batch()))
    mine, other = batch(1), made.embed(*batch(2))
    shown: list[Tensor] = []

    def mean(x: Tensor) -> Tensor:
        shown.append((x + torch.cat([x[: len(x) - 64], other])) / 2)
        return shown[0]

    made.decide(1.0, *mine, mean)
    z = shown[0][-64:]
    assert float(z.norm()) < 0.9
    assert made.last_novelty == pytest.approx(made.novelty(z / z.norm()), abs=1e-6)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"target_novelty": 0.0}, r"target_novelty, must be in \(0, 1\]; got 0"),
        ({"burn_in": -1}, "burn_in must be >= 0; got -1"),
        ({"compat": "older"}, "compat must be 'source' or None; got 'older'"),
        ({"controller": "p"}, "controller must be one of corrected, source; got 'p'"),
        ({"target_novelty_scaler": 5.0, "novelty_scaler": 5.0}, "two names of one thing"),
        ({"novelty_scaler": 0.0}, "target_novelty_scaler must be > 0"),
        ({"k_topk": 0}, "k_topk must be >= 1; got 24, 40, 0"),
        ({"k": 65}, "wanted 1 <= k <= m"),
        ({"fd_mode": "x"}, "fd_mode must be one of liberty, orthonormal"),
    ],
)
def test_what_a_gate_cannot_be_made_of_is_refused(more: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        gate(**more)


def test_shapes_that_do_not_fit_are_refused() -> None:
    made, (hidden, logits, labels) = gate(), batch()
    with pytest.raises(ValueError, match=r"hidden must be \(batch, tokens, 24\); got \(2, 6, 23\)"):
        made.embed(hidden[..., 1:], logits, labels)
    with pytest.raises(ValueError, match=r"logits must be \(2, 6, 40\).*got \(2, 6, 39\)"):
        made.embed(hidden, logits[..., 1:], labels)
    with pytest.raises(ValueError, match=r"labels must be \(2, 6\), as hidden is; got \(2, 5\)"):
        made.embed(hidden, logits, labels[:, 1:])
    with pytest.raises(ValueError, match=r"weight must be \(40, 24\); got \(39, 24\)"):
        made.embed_from_weight(hidden, torch.zeros(39, H), labels)
    with pytest.raises(ValueError, match='not for compat="source"'):
        gate(compat="source").embed_from_weight(hidden, torch.zeros(V, H), labels)
    with pytest.raises(ValueError, match="the gate was made with k = 8, this one has 7"):
        gate(k=7).load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match="a gate must be one of novelty, loss_floor, both, random; got 'all'"):
        opened("all", H, V, target_novelty=0.3, burn_in=0, seed=0)
    with pytest.raises(ValueError, match=r"a quantile within \(0, 1\); got 0"):
        LossFloor(0.0)


def test_beta_has_two_names_and_liberty_is_the_default() -> None:
    assert (gate(novelty_scaler=7).scaler, gate(target_novelty_scaler=7).scaler, gate().scaler) == (7, 7, 10)
    assert gate().sketch.mode == "liberty"
    assert gate(compat="source", fd_mode="liberty").sketch.mode == "liberty"


def test_the_gate_is_imported_without_a_trainer() -> None:
    code = (
        "import sys; from spectral_fast.training import HeadGradientGate; "
        "print(sorted({'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

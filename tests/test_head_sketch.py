"""The TensorSketch of the head's gradient: each backend against float64, and the estimate against what it estimates."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, chosen_backends, native_missing
from spectral_fast.kernels.head_sketch import IGNORED, Hashes, head_sketch, head_sketch_from_weight, top_logits
from spectral_fast.kernels.head_sketch import reference as definition

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["cpu", "gpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend by force, so that a test of one cannot pass by way of another."""
    name: str = request.param
    if name == "cpu" and native_missing() and os.environ.get("CI") != "true":
        pytest.skip(str(native_missing()))
    if name == "gpu":
        pytest.importorskip("triton")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    return name


def batch(tokens: int, features: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden, logits and labels, of which every fifth is left out."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden = torch.randn(tokens, features, generator=generator).to(dtype)
    logits = (4 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[1::5] = IGNORED
    return hidden, logits, labels


def dense_errors(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """e of every token in float64, (tokens, vocabulary), and the probabilities in it without the ones at the labels."""
    kept = labels != IGNORED
    order = logits.double().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, value=True)
    gold = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[1]).double()
    p = logits.double().softmax(1) * (chosen | gold.bool()) * kept[:, None]
    return p - gold * kept[:, None], p + gold * kept[:, None]


def by_definition(hidden: Tensor, errors: Tensor, hashes: Hashes) -> Tensor:
    """z[(b_h(i) + b_e(j)) mod m] += sign_h(i) sign_e(j) Σ_t e_tj h_ti, in float64."""
    gradient = (errors.mT @ hidden.double()) * hashes.sign_e.double()[:, None] * hashes.sign_h.double()
    buckets = (hashes.bucket_e[:, None] + hashes.bucket_h) % hashes.m
    return torch.zeros(hashes.m, dtype=torch.float64).index_add_(0, buckets.flatten().long(), gradient.flatten())


def check(hidden: Tensor, logits: Tensor, labels: Tensor, hashes: Hashes, top_k: int, z: Tensor) -> None:
    """Within the roundoffs of every term: of logsumexp and exp, of both CountSketches, of products and sums."""
    errors, sizes = dense_errors(logits, labels, top_k)
    size = by_definition(hidden.abs(), sizes, Hashes(*unsigned(hashes), hashes.m))
    steps = math.log2(max(2, hashes.m)) + 32  # sums of 32 tokens, and the reference's transforms
    most = int(logits.abs().max()) / 8 + logits.shape[1] / 64 + hidden.shape[1] / hashes.m * 4 + top_k + steps + 40
    error = (z.double() - by_definition(hidden, errors, hashes)).abs()
    # A transform spreads errors over all of z.
    bound = most * EPS * torch.maximum(size, size.mean())
    assert z.shape == (hashes.m,)
    assert (error <= bound).all(), float((error / bound).max())


def unsigned(hashes: Hashes) -> tuple[Tensor, ...]:
    return hashes.bucket_h, hashes.sign_h.abs(), hashes.bucket_e, hashes.sign_e.abs()


SIZES = [
    (33, 12, 100, 32, 3),  # more tokens than are summed in float32
    (6, 12, 100, 32, 3),
    (4, 7, 65, 5, 64),
    (3, 130, 64, 300, 1),
    (2, 16, 40, 16, 500),
    (3, 5, 5000, 8, 4),
    (1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features", "vocabulary", "m", "top_k"), SIZES)
def test_z_is_right_for_every_size_and_dtype(
    backend: str, tokens: int, features: int, vocabulary: int, m: int, top_k: int, dtype: torch.dtype
) -> None:
    if backend == "gpu" and tokens > 6:
        pytest.skip("the interpreter is slow")
    hidden, logits, labels = batch(tokens, features, vocabulary, dtype)
    hashes = Hashes.draw(features, vocabulary, m, seed=3)
    z = head_sketch(hidden, logits, labels, hashes, top_k)
    assert z.dtype == torch.float32
    check(hidden, logits, labels, hashes, top_k, z)
    assert {name: chosen_backends()[name] for name in ("top_logits", "tensor_sketch")} == {
        "top_logits": backend,
        "tensor_sketch": backend,
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logits_are_those_of_the_definition_with_ties_to_the_lowest_id(
    backend: str, dtype: torch.dtype
) -> None:
    del backend
    _, logits, labels = batch(10, 1, 700, dtype)
    logits = logits.float().round().to(dtype)  # some 30 different values: ties everywhere
    logits[2] = 0
    logits[3] = torch.linspace(-5, 5, 700)
    logits[4] = torch.linspace(5, -5, 700)
    logits[5, 10:] = -torch.inf  # fewer finite logits than are asked for
    logits[7, ::2] = -0.0
    labels[9] = -1
    found = top_logits(logits, labels, 20)
    wanted = definition.top_logits(logits, labels, 20)
    assert torch.equal(found.ids, wanted[3])
    assert torch.equal(found.values, wanted[2])
    assert torch.equal(found.gold, wanted[1])
    exact = logits.double().logsumexp(1).masked_fill(labels == IGNORED, 0)
    assert ((found.logsumexp - exact).abs() <= (700 / 64 + 8) * EPS * exact.abs().clamp(min=1)).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("chunk", [1, 64, 333, 5000])
def test_from_the_weight_in_chunks_of_any_size_it_is_the_same(chunk: int) -> None:
    if os.environ[ENVIRONMENT_VARIABLE] == "gpu" and chunk < 333:
        pytest.skip("launches are slow in the interpreter")
    hidden, _, labels = batch(8, 24, 1)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(700, 24, generator=generator), torch.randn(700, generator=generator)
    labels = torch.where(labels == IGNORED, IGNORED, torch.randint(0, 700, (8,), generator=generator))
    hashes = Hashes.draw(24, 700, 64, seed=0)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    z = head_sketch_from_weight(hidden, weight, labels, hashes, 16, bias, chunk)
    check(hidden, logits, labels, hashes, 16, z)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # Triton's interpreter is NumPy
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("least", [-math.inf, torch.finfo(torch.float32).min])
def test_a_chunk_of_ids_that_are_all_masked_counts_nothing(least: float) -> None:
    hidden, _, labels = batch(8, 24, 40)
    weight, bias = torch.randn(700, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(700)
    bias[300:] = least
    hashes = Hashes.draw(24, 700, 64, seed=0)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    z = head_sketch_from_weight(hidden, weight, labels, hashes, 16, bias, chunk=350)
    wanted = by_definition(hidden, dense_errors(logits, labels, 16)[0], hashes)
    torch.testing.assert_close(z.double(), wanted, rtol=0, atol=1e-4)
    top = top_logits(torch.full((2, 70), least), torch.tensor([-1, -1]), 3)
    exact = torch.full((2, 70), least).logsumexp(1)
    assert torch.equal(top.logsumexp, exact)
    assert torch.equal(top.values, torch.full((2, 3), least))
    assert top.ids.tolist() == [[0, 1, 2]] * 2


@pytest.mark.usefixtures("backend")
def test_ignored_tokens_are_not_even_read() -> None:
    hidden, logits, labels = batch(10, 8, 100)
    hashes = Hashes.draw(8, 100, 16, seed=0)
    wanted = head_sketch(hidden, logits, labels, hashes, 4)
    hidden[labels == IGNORED], logits[labels == IGNORED] = torch.nan, torch.nan
    assert torch.equal(head_sketch(hidden, logits, labels, hashes, 4), wanted)
    nothing = torch.full_like(labels, IGNORED)
    assert torch.equal(head_sketch(hidden, logits, nothing, hashes, 4), torch.zeros(16))
    assert torch.equal(head_sketch_from_weight(hidden, torch.ones(100, 8), nothing, hashes, 4), torch.zeros(16))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Triton's interpreter is NumPy
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    hidden, logits, labels = batch(10, 8, 100)
    hashes = Hashes.draw(8, 100, 16, seed=0)
    logits[2, 70] = value
    assert head_sketch(hidden, logits, labels, hashes, 4).isnan().all()


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    hidden, logits, labels = batch(300, 200, 3000, torch.bfloat16)
    hashes = Hashes.draw(200, 3000, 128, seed=0)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(head_sketch(hidden, logits, labels, hashes, 32))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_inner_products_of_sketches_are_unbiased() -> None:
    """⟨z, z'⟩ estimates the gradients' inner product: the mean of many draws is within 4 standard errors of it."""
    hidden, logits, labels = batch(6, 12, 40)
    noise = batch(7, 12, 40)
    other_hidden, other_logits = hidden + noise[0][:6], logits + noise[1][:6] / 4
    top_k, draws = 40, 3000
    gradients = [
        dense_errors(x, labels, top_k)[0].mT @ h.double() for x, h in ((logits, hidden), (other_logits, other_hidden))
    ]
    exact = float((gradients[0] * gradients[1]).sum())
    estimates = torch.empty(draws, dtype=torch.float64)
    for seed in range(draws):
        hashes = Hashes.draw(12, 40, 16, seed=2 * seed)
        z = head_sketch(hidden, logits, labels, hashes, top_k)
        estimates[seed] = z.double() @ head_sketch(other_hidden, other_logits, labels, hashes, top_k).double()
    assert abs(float(estimates.mean()) - exact) <= 4 * float(estimates.std()) / math.sqrt(draws)
    # And it is an estimate of something: the bound is not met by any number.
    assert 4 * float(estimates.std()) / math.sqrt(draws) < abs(exact) / 2


def test_hashes_depend_on_the_seed_alone() -> None:
    hashes, again, other = (Hashes.draw(50, 60, 7, seed) for seed in (5, 5, 6))
    for name in ("bucket_h", "sign_h", "bucket_e", "sign_e"):
        assert torch.equal(getattr(hashes, name), getattr(again, name))
        assert not torch.equal(getattr(hashes, name), getattr(other, name))
    # Those of e are drawn by the next seed's generator, bucket first.
    generator = torch.Generator().manual_seed(6)
    assert torch.equal(hashes.bucket_e, torch.randint(0, 7, (60,), generator=generator).int())
    assert hashes.bucket_h.unique().tolist() == list(range(7))
    assert hashes.sign_e.unique().tolist() == [-1, 1]
    assert torch.equal(hashes.to("cpu").sign_h, hashes.sign_h)


def test_tensors_need_not_be_contiguous_and_have_no_gradient() -> None:
    hidden, logits, labels = batch(10, 8, 100)
    hashes = Hashes.draw(8, 100, 16, seed=0)
    wanted = head_sketch(hidden, logits, labels, hashes, 4)
    strided = head_sketch(
        hidden.mT.contiguous().mT.requires_grad_(), logits.repeat(1, 2)[:, :100], labels.repeat(2)[:10], hashes, 4
    )
    assert torch.equal(strided, wanted)
    assert not strided.requires_grad


def test_float64_gives_float64() -> None:
    hidden, logits, labels = batch(10, 8, 100)
    hashes = Hashes.draw(8, 100, 16, seed=0)
    z = head_sketch(hidden.double(), logits.double(), labels, hashes, 4)
    wanted = by_definition(hidden, dense_errors(logits, labels, 4)[0], hashes)
    assert torch.allclose(z, wanted, rtol=0, atol=1e-12)


def test_arguments_that_do_not_fit_are_refused() -> None:
    hidden, logits, labels = batch(10, 8, 100)
    hashes = Hashes.draw(8, 100, 16, seed=0)
    with pytest.raises(ValueError, match=r"hashes are of 8 hidden features and 100 ids.*got hidden \(10, 7\)"):
        head_sketch(hidden[:, :7], logits, labels, hashes, 4)
    with pytest.raises(ValueError, match=r"logits would be \(9, 100\)"):
        head_sketch(hidden, logits[:9], labels, hashes, 4)
    with pytest.raises(ValueError, match=r"weight .* got hidden \(10, 8\), and logits would be \(10, 99\)"):
        head_sketch_from_weight(hidden, torch.ones(99, 8), labels, hashes, 4)
    with pytest.raises(ValueError, match=r"labels must be \(10,\), one per token, got \(9,\)"):
        head_sketch(hidden, logits, labels[:9], hashes, 4)
    with pytest.raises(TypeError, match=r"labels must be int64, got torch\.int32"):
        head_sketch(hidden, logits, labels.int(), hashes, 4)
    for wrong in (100, -1, -7):
        with pytest.raises(ValueError, match=f"one is {wrong}"):
            head_sketch(hidden, logits, torch.full_like(labels, wrong), hashes, 4)
    with pytest.raises(TypeError, match=r"logits must be a matrix of .* got \(10, 100\) torch\.int64"):
        head_sketch(hidden, logits.long(), labels, hashes, 4)
    with pytest.raises(TypeError, match=r"hidden must be one of .*; got torch\.int64"):
        head_sketch(hidden.long(), logits, labels, hashes, 4)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        head_sketch(hidden, logits, labels, hashes, 0)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        head_sketch_from_weight(hidden, torch.ones(100, 8), labels, hashes, 4, chunk=0)
    with pytest.raises(ValueError, match="m must be at least 1, got 0"):
        Hashes.draw(8, 100, 0, seed=0)


def test_the_ops_pass_opcheck() -> None:
    hidden, logits, labels = batch(10, 8, 100)
    hashes = Hashes.draw(8, 100, 16, seed=0)
    torch.library.opcheck(torch.ops.spectral_fast.top_logits.default, (logits, labels, 4))
    top = top_logits(logits, labels, 4)
    tables = (hashes.bucket_h, hashes.sign_h, hashes.bucket_e, hashes.sign_e)
    torch.library.opcheck(torch.ops.spectral_fast.tensor_sketch.default, (hidden, *top, labels, *tables, 16))

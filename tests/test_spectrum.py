"""The spectrum of one module, and factors rebuilt from an edited one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from spectral_fast.backends import ENVIRONMENT_VARIABLE, native_missing
from spectral_fast.spectrum import Spectrum, lowrank_svd

EPS = torch.finfo(torch.float32).eps
CONDITIONS = (1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8)


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend by force, so that a test of one cannot pass by way of another."""
    if request.param == "cpu" and native_missing() and os.environ.get("CI") != "true":
        pytest.skip(str(native_missing()))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)


def factors(m: int, r: int, n: int, condition: float = 10.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n)

    def side(rows: int) -> Tensor:
        q, _ = torch.linalg.qr(torch.randn(rows, r, dtype=torch.float64, generator=generator))
        p, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64, generator=generator))
        k = min(rows, r)
        return q * torch.tensor(condition, dtype=torch.float64) ** -torch.linspace(0, 1, k) @ p[:k]

    return side(m).float(), side(n).mT.float()


def product(b: Tensor, a: Tensor) -> Tensor:
    return b.double() @ a.double()


def off(got: tuple[Tensor, Tensor], wanted: Tensor) -> float:
    """‖B'A' − wanted‖ / ‖wanted‖ in the Frobenius norm."""
    return float((product(*got) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("m", "r", "n"), [(61, 1, 97), (64, 8, 128), (131, 64, 70), (100, 31, 257)])
def test_an_edit_that_changes_nothing_keeps_the_update(m: int, r: int, n: int, condition: float) -> None:
    b, a = factors(m, r, n, condition)
    spectrum = Spectrum.of(b, a)
    rebuilt = spectrum.rebuild(spectrum.s)
    # Rounding B' and A' to float32 costs half an eps each, times √(Σs · s_max / Σs²) ≤ (1 + √r) / 2 < 5.
    assert off(rebuilt, product(b, a)) <= 1e-6
    assert [x.dtype for x in rebuilt] == [torch.float32] * 2
    assert [tuple(x.shape) for x in rebuilt] == [(m, r), (r, n)]
    assert all(x.is_contiguous() for x in rebuilt)


@pytest.mark.parametrize(("m", "r", "n"), [(64, 8, 128), (131, 64, 70), (5, 8, 40), (40, 8, 3), (4097, 4, 2049)])
def test_an_edit_gives_the_update_with_the_new_singular_values(m: int, r: int, n: int) -> None:
    b, a = factors(m, r, n)
    spectrum = Spectrum.of(b, a)
    u, s, vh = torch.linalg.svd(product(b, a), full_matrices=False) if m * n < 1e5 else _wide(spectrum)
    gains = torch.linspace(1.5, 0.5, r, dtype=torch.float64)
    gains[r // 2] = 0
    wanted = u[:, :r] * (s[:r] * gains[: len(s)]) @ vh[:r]
    assert off(spectrum.rebuild(spectrum.s * gains), wanted) <= 1e-6


def _wide(spectrum: Spectrum) -> tuple[Tensor, Tensor, Tensor]:
    return spectrum.u.double(), spectrum.s, spectrum.vh.double()


def test_rebuilt_factors_share_the_singular_values_evenly() -> None:
    b, a = factors(64, 8, 128)
    spectrum = Spectrum.of(b, a)
    b_new, a_new = (x.double() for x in spectrum.rebuild(spectrum.s))
    for gram in (b_new.mT @ b_new, a_new @ a_new.mT):
        # B'ᵀB' = diag(s) up to the rounding of B' to float32: half an eps for either factor of each product.
        assert (gram - spectrum.s.diag()).abs().max() <= 8 * EPS * spectrum.s[0]


@pytest.mark.parametrize(
    ("b_dtype", "a_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float64, torch.bfloat16)],
)
def test_factors_come_back_in_their_own_dtypes(b_dtype: torch.dtype, a_dtype: torch.dtype) -> None:
    b, a = factors(64, 8, 128)
    b, a = b.to(b_dtype), a.to(a_dtype)
    spectrum = Spectrum.of(b, a)
    b_new, a_new = spectrum.rebuild(spectrum.s)
    assert (b_new.dtype, a_new.dtype) == (b_dtype, a_dtype)
    assert spectrum.u.dtype == torch.promote_types(b_dtype, torch.float32)
    assert spectrum.vh.dtype == torch.promote_types(a_dtype, torch.float32)
    # Each factor is rounded once, by half an eps of its dtype, times (1 + √r) / 2 < 2 as above.
    bound = torch.finfo(b_dtype).eps + torch.finfo(a_dtype).eps
    assert off((b_new, a_new), product(b, a)) <= bound


def test_float64_factors_keep_float64_accuracy() -> None:
    b, a = (x.double() for x in factors(64, 8, 128))
    spectrum = Spectrum.of(b, a)
    assert off(spectrum.rebuild(spectrum.s), product(b, a)) <= 30 * 8 * torch.finfo(torch.float64).eps


def test_u_and_vh_are_the_compact_svd() -> None:
    b, a = factors(64, 8, 128)
    spectrum = Spectrum.of(b, a)
    u, s, vh = _wide(spectrum)
    assert off((u * s, vh), product(b, a)) <= 30 * 8 * EPS
    for gram in (u.mT @ u, vh @ vh.mT):
        assert (gram - torch.eye(8)).norm() <= 30 * 8 * EPS


@pytest.mark.parametrize("scale", [1e-25, 1e-40, 1e18])
def test_an_edit_works_at_scales_near_overflow_and_underflow(scale: float) -> None:
    b, a = factors(64, 8, 128)
    b, a = b * scale, a * scale
    spectrum = Spectrum.of(b, a)
    # B' and A' are of the size of √s: where that is subnormal, a float32 has fewer digits.
    digits = max(1e-6, 16 * torch.finfo(torch.float32).smallest_normal * EPS / scale)
    assert off(spectrum.rebuild(spectrum.s), product(b, a)) <= digits


def test_directions_that_carry_nothing_stay_silent_unless_asked() -> None:
    b, a = factors(64, 8, 128)
    b[:, 2] = 0
    spectrum = Spectrum.of(b, a)
    assert off(spectrum.rebuild(spectrum.s), product(b, a)) <= 1e-6
    louder = spectrum.s.clone()
    louder[7] = spectrum.s[0]  # u and vh are orthonormal there too, so that this is a well-defined edit
    values = torch.linalg.svdvals(product(*spectrum.rebuild(louder)))[:8]
    assert torch.allclose(values, louder.sort(descending=True).values, rtol=0, atol=8 * 8 * EPS * float(louder[0]))


def test_the_zero_adapter_of_a_fresh_lora_can_be_edited() -> None:
    _, a = factors(64, 8, 128)
    spectrum = Spectrum.of(torch.zeros(64, 8), a)
    assert not spectrum.s.any()
    b_new, a_new = spectrum.rebuild(spectrum.s)
    assert not b_new.any()
    assert not a_new.any()


def test_new_singular_values_that_make_no_sense_are_refused() -> None:
    spectrum = Spectrum.of(*factors(64, 3, 128))
    with pytest.raises(ValueError, match=r"s_new must have shape \(3,\), got \(4,\)"):
        spectrum.rebuild(torch.ones(4))
    for bad in (-1e-9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="s_new must be finite and not negative, got"):
            spectrum.rebuild(torch.tensor([1, bad, 0]))


def test_spectra_of_many_modules_come_in_order_with_names_in_errors() -> None:
    pairs = [factors(64, 8, 128), factors(40, 4, 30), factors(50, 8, 60)]
    spectra = lowrank_svd([b for b, _ in pairs], [a for _, a in pairs])
    for (b, a), spectrum in zip(pairs, spectra, strict=True):
        assert off(spectrum.rebuild(spectrum.s), product(b, a)) <= 1e-6
    with pytest.raises(ValueError, match="q_proj: B"):
        lowrank_svd([torch.full((4, 2), torch.nan)], [torch.ones(2, 4)], ["q_proj"])

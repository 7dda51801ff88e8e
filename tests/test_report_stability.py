"""The picture of whether the samples were enough."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from spectral_fast.edit import EditedModule
from spectral_fast.policies import AbsSelect
from spectral_fast.report import pictures, save_pictures, write_report
from spectral_fast.report.drawing import CORE, INK, NOISE, Picture
from spectral_fast.statistics import Stability, standard_error

NAMES = [f"layers.{i}.o_proj" for i in range(3)]


def parts(n: int = 16, ranks: tuple[int, ...] = (8, 8, 8), signal: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: signal * torch.randn(r, generator=generator) + torch.randn(n, r, generator=generator)
        for name, r in zip(NAMES, ranks, strict=True)
    }


def edits(samples: dict[str, torch.Tensor]) -> dict[str, EditedModule]:
    edited = {}
    for name, rows in samples.items():
        s, g = torch.linspace(2, 1, rows.shape[1], dtype=torch.float64), rows.double().sum(0)
        edited[name] = EditedModule(s, g, AbsSelect().apply(s, g, name))
    return edited


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in place of their pictures."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Picture, "of", lambda figure, *_: drawn.append(figure))
    return drawn


def test_the_report_has_the_picture_where_there_is_g_per_sample(tmp_path: Path) -> None:
    samples = parts()
    edited, stability = edits(samples), Stability.of(samples)
    for given, images in ((None, 3), (stability, 4)):
        write_report(tmp_path / "report.html", "adapter", edited, stability=given)
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert text.count("<img") == images
        assert ("Were the samples enough?" in text) == (images == 4)
    assert [file.name for file in save_pictures(tmp_path, edited, stability)][-1] == "stability.png"


def test_the_caption_has_the_numbers() -> None:
    samples = parts()
    stability = Stability.of(samples)
    caption = pictures(edits(samples), stability)[-1].caption
    last, (core, noise) = stability.agreement[-1], stability.certain()
    assert f"With 16 samples {last.doubling:.0%} and {last.halves:.0%} agree" in caption
    assert f"without signal {last.doubling_by_chance:.0%} and {last.halves_by_chance:.0%}" in caption
    assert f"{core:.0%} of the core directions and {noise:.0%} of the noise directions again" in caption


def test_agreement_is_drawn_by_number_of_samples(panels: list[Figure]) -> None:
    samples = parts()
    stability = Stability.of(samples)
    pictures(edits(samples), stability)
    lines = [line.get_xydata().tolist() for line in panels[-1].axes[0].lines]
    fields = ("doubling", "doubling_by_chance", "halves", "halves_by_chance")
    assert lines == [[[e.samples, getattr(e, field)] for e in stability.agreement] for field in fields]


def test_g_and_its_error_are_drawn_in_the_order_of_g(panels: list[Figure]) -> None:
    samples = parts()
    pictures(edits(samples), Stability.of(samples))
    band, line = (patch.get_data() for patch in panels[-1].axes[1].patches)
    sizes, errors = [], []
    for rows in samples.values():
        g = rows.double().sum(0).abs()
        order = g.argsort(descending=True)
        sizes.append(g[order] / g.mean())
        errors.append(standard_error(rows)[order] / g.mean())
    size, error = torch.stack(sizes).mean(0), torch.stack(errors).mean(0)
    assert line.values.tolist() == pytest.approx(size.tolist())
    assert band.values.tolist() == pytest.approx((size + error).tolist())
    assert band.baseline.tolist() == pytest.approx((size - error).clamp_min(0).tolist())
    assert line.edges.tolist() == pytest.approx([k / 8 for k in range(9)])


def test_probabilities_are_drawn_beside_what_was_chosen(panels: list[Figure]) -> None:
    samples = parts()
    stability = Stability.of(samples)
    pictures(edits(samples), stability)
    drawn = [patch.get_data().values.tolist() for patch in panels[-1].axes[2].patches]
    orders = {name: rows.double().sum(0).abs().argsort(descending=True) for name, rows in samples.items()}
    for role in (0, 1):
        expected = torch.stack([stability.membership[name][role][orders[name]] for name in NAMES]).mean(0)
        assert drawn[3 * role] == drawn[3 * role + 1] == pytest.approx(expected.tolist())
    assert drawn[2] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert drawn[5] == [0, 0, 0, 0, 0, 0, 1, 1]


def test_core_and_noise_have_their_colours(panels: list[Figure]) -> None:
    samples = parts()
    pictures(edits(samples), Stability.of(samples))
    from matplotlib.colors import to_hex

    edges = [to_hex(patch.get_edgecolor()) for patch in panels[-1].axes[2].patches if not patch.get_fill()]
    assert edges == [CORE, CORE, NOISE, NOISE]
    assert panels[-1].axes[0].lines[0].get_color() == INK


def test_a_module_of_lower_rank_is_stretched_over_the_same_width(panels: list[Figure]) -> None:
    samples = parts(ranks=(8, 4, 0))
    pictures(edits(samples), Stability.of(samples))
    line = panels[-1].axes[1].patches[1].get_data().values
    sizes = [(g := samples[name].double().sum(0).abs()).sort(descending=True).values / g.mean() for name in NAMES[:2]]
    expected = (sizes[0] + sizes[1].repeat_interleave(2)) / 2
    assert line.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(parts(n=2), id="two_samples"),
        pytest.param(parts(n=3), id="three_samples"),
        pytest.param(parts(n=500), id="many_samples"),
        pytest.param(parts(ranks=(1, 1, 1)), id="rank_one"),
        pytest.param(parts(ranks=(64, 16, 2)), id="ranks_differ"),
        pytest.param({name: torch.zeros(9, 8) for name in NAMES}, id="dead"),
    ],
)
def test_odd_calibrations_are_drawn_without_a_warning(samples: dict[str, torch.Tensor]) -> None:
    picture = pictures(edits(samples), Stability.of(samples))[-1]
    assert picture.name == "stability"
    width, height = struct.unpack(">II", picture.png[16:24])
    assert width == 1500
    assert 450 < height < 650


def test_there_is_no_picture_of_nothing() -> None:
    samples = parts(n=1)
    assert len(pictures(edits(samples), Stability.of(samples))) == 3
    samples = parts()
    nothing = AbsSelect(core_frac=0.0, noise_frac=0.0, min_core_k=0)
    assert len(pictures(edits(samples), Stability.of(samples, nothing))) == 3

"""The report: one valid HTML file that needs no other, for every shape of edit, and true pictures."""

from __future__ import annotations

import base64
import re
import struct
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from spectral_fast import report
from spectral_fast.edit import EditedModule
from spectral_fast.policies import POLICIES
from spectral_fast.report import EvaluationRow, pictures, save_pictures, write_report
from spectral_fast.report.drawing import CORE, INK, NOISE, OTHER, Drawn, Picture
from spectral_fast.report.heat_maps import sensitivity_by_direction
from spectral_fast.report.names import Place, places
from spectral_fast.report.page import page

PREFIX = "base_model.model.model.layers"
KINDS = ["mlp.down_proj", "self_attn.o_proj"]
ONE = [f"{PREFIX}.0.mlp.down_proj"]
VOID = {"meta", "img", "br", "link", "hr", "input"}
NAMES = ["spectra", "sensitivity_by_layer", "sensitivity_by_direction"]


def edits(
    names: list[str], mode: str = "abs_select", ranks: tuple[int, ...] = (8,), zeros: int = 0, **options: Any
) -> dict[str, EditedModule]:
    """Random spectra with `zeros` dead ranks, edited by a real policy; ranks are taken in turn."""
    generator = torch.Generator().manual_seed(0)
    policy = POLICIES[mode](**options)
    edited = {}
    for i, name in enumerate(names):
        r = ranks[i % len(ranks)]
        s = torch.rand(r, generator=generator, dtype=torch.float64).sort(descending=True).values
        s[r - zeros :] = 0
        g = torch.randn(r, generator=generator, dtype=torch.float64) if policy.needs_sensitivity else None
        edited[name] = EditedModule(s, g, policy.apply(s, g, name))
    return edited


def layers(count: int, kinds: list[str] = KINDS) -> list[str]:
    return [f"{PREFIX}.{layer}.{kind}" for layer in range(count) for kind in kinds]


class Reader(HTMLParser):
    """Walks a document: every end tag must close what is open; collects texts, table rows and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        assert not [name for name in names if name.startswith("on")]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def read(tmp_path: Path, edited: dict[str, EditedModule], title: str = "adapter", **more: Any) -> Reader:
    file = tmp_path / "report.html"
    write_report(file, title, edited, **more)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    return Reader(text)


def tables(edited: dict[str, EditedModule], **more: Any) -> list[list[str]]:
    return Reader(page("title", edited, [], more.get("evaluation", ()), more.get("facts", {}))).rows


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_a_report_is_one_valid_file_with_three_pictures(tmp_path: Path) -> None:
    reader = read(tmp_path, edits(layers(3)))
    assert reader.tags.count("img") == 3
    assert reader.tags.count("table") == 1
    for address in reader.addresses:
        kind, data = address.split(",")
        assert kind == "data:image/png;base64"
        assert min(size(base64.b64decode(data, validate=True))) > 100
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    reader = read(tmp_path, edits(layers(2)))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r'base64,[^"]*"', "", text))
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = "<script>alert('1')</script>"
    quote = '" onload="alert(1)'
    reader = read(
        tmp_path,
        edits([f"layers.0.{hostile}", f"layers.1.{quote}", "$a_{b$", "50%_\\frac{"]),
        title=hostile + quote,
        evaluation=[EvaluationRow(hostile, 0.5, 0.1)],
        facts={hostile: [quote, {"&amp;": hostile}]},
    )
    assert "script" not in reader.tags
    assert reader.texts.count(hostile + quote) == 2  # the heading and the title
    assert [hostile, "50.00%", "10.00%", "–", "–", "–"] in reader.rows
    assert [hostile, f"{quote}, &amp;: {hostile}"] in reader.rows
    assert {f"layers.0.{hostile}", f"layers.1.{quote}", "$a_{b$"} <= {row[0] for row in reader.rows}


def test_a_title_that_is_no_text_can_still_be_written(tmp_path: Path) -> None:
    reader = read(tmp_path, edits(ONE), title="adapter-\udcff")
    assert "adapter-\\udcff" in reader.texts


def test_the_table_of_modules_has_the_numbers_of_the_edit() -> None:
    edited = edits(layers(2), core_frac=0.25, noise_frac=0.5, preserve_energy="none")
    rows = {row[0]: row[1:] for row in tables(edited)}
    for name, module in edited.items():
        r, before, after, top, new_top, core, noise, g = rows[name]
        assert (r, core, noise) == ("8", "2", "4")
        assert (before, after) == (f"{module.s.sum():.4g}", f"{module.edit.s_new.sum():.4g}")
        assert (top, new_top) == (f"{module.s.max():.4g}", f"{module.edit.s_new.max():.4g}")
        assert module.g is not None
        assert g == f"{module.g.abs().mean():.3g}"


def test_evaluation_and_facts_are_tables() -> None:
    rows = tables(
        edits(ONE),
        evaluation=[
            EvaluationRow("original", 0.7013, 0.0126),
            EvaluationRow("edited", 0.7134, 0.0124, 0.0121, (-0.004, 0.0283), 0.1421),
            EvaluationRow("control", 0.5, 0.0138, -0.2013, (-0.23, -0.17), 1e-9),
        ],
        facts={
            "mode": "abs_select",
            "align": True,
            "eta": 0.2,
            "stop": None,
            "targets": ["o_proj", "down_proj"],
        },
    )
    assert ["original", "70.13%", "1.26%", "–", "–", "–"] in rows
    assert ["edited", "71.34%", "1.24%", "+1.21", "-0.40 to +2.83", "0.142"] in rows
    assert ["control", "50.00%", "1.38%", "-20.13", "-23.00 to -17.00", "< 0.001"] in rows
    assert ["targets", "o_proj, down_proj"] in rows
    assert ["align", "yes"] in rows
    assert ["eta", "0.2"] in rows
    assert ["stop", "–"] in rows


def test_without_sensitivities_only_the_spectra_are_drawn_and_the_report_says_so(tmp_path: Path) -> None:
    edited = edits(ONE, mode="random_index")
    reader = read(tmp_path, edited)
    assert reader.tags.count("img") == 1
    assert any("no sensitivities" in text for text in reader.texts)
    assert {row[-1] for row in reader.rows[1:]} == {"–"}
    assert not any("no sensitivities" in text for text in read(tmp_path, edits(ONE)).texts)


@pytest.mark.parametrize("mode", sorted(POLICIES))
def test_every_mode_can_be_drawn(mode: str) -> None:
    expected = NAMES if POLICIES[mode].needs_sensitivity else NAMES[:1]
    assert [picture.name for picture in pictures(edits(ONE, mode=mode))] == expected


@pytest.mark.parametrize(
    "edited",
    [
        pytest.param(edits(ONE), id="single"),
        pytest.param(edits(ONE, ranks=(1,)), id="rank_one"),
        pytest.param(edits(["fc"]), id="no_layer"),
        pytest.param(edits([f"fc{i}" for i in range(70)]), id="many_kinds"),
        pytest.param(edits([*layers(5), "lm_head"], ranks=(1, 2, 16, 0)), id="ranks_differ"),
        pytest.param(edits(ONE, zeros=3), id="dead_ranks"),
        pytest.param(edits(ONE, zeros=8), id="all_zero"),
        pytest.param(edits(ONE, sup_factor=0.0, noise_frac=0.5), id="zero_gain"),
        pytest.param(edits(ONE, amp_factor=1e6, preserve_energy="none"), id="huge_gain"),
        pytest.param(edits([f"{PREFIX}.{i}.experts.{j}.up_proj" for i in range(3) for j in range(40)]), id="experts"),
        pytest.param(edits(ONE, ranks=(256,)), id="wide"),
        pytest.param(edits(layers(6), mode="gd"), id="all_core_or_noise"),
    ],
)
def test_odd_edits_are_drawn_without_a_warning(edited: dict[str, EditedModule]) -> None:
    for picture in pictures(edited):
        width, height = size(picture.png)
        assert 400 < width <= 1500
        assert 150 < height < 6000
        assert width == pytest.approx(150 * picture.width, abs=1)


def test_zero_sensitivities_are_drawn() -> None:
    edited = {name: EditedModule(m.s, torch.zeros_like(m.s), m.edit) for name, m in edits(ONE).items()}
    assert len(pictures(edited)) == 3


def test_modules_of_rank_zero_are_in_the_table_only(tmp_path: Path) -> None:
    reader = read(tmp_path, edits(ONE, ranks=(0,)))
    assert "img" not in reader.tags
    assert [row[1:] for row in reader.rows[1:]] == [["0", "0", "0", "0", "0", "0", "0", "–"]]


def test_560_modules_take_seconds_and_less_than_3_mb(tmp_path: Path) -> None:
    kinds = [*KINDS, *(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    edited = edits(layers(80, kinds), ranks=(64,))
    began = time.process_time()
    reader = read(tmp_path, edited)
    assert time.process_time() - began < 20
    assert len(reader.rows) == 1 + 560
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_captions_say_what_is_left_out() -> None:
    [spectra, by_layer, by_direction] = pictures(edits([*layers(20), "lm_head"], zeros=2))
    assert "12 of 41 modules" in spectra.caption
    assert "lower edge" in spectra.caption
    assert "Grey: no such module" in by_layer.caption
    assert "without a layer number" in by_layer.caption
    assert "Grey: a singular value that is zero" in by_direction.caption
    [spectra, by_layer, by_direction] = pictures(edits(ONE))
    assert "modules" not in spectra.caption
    assert not any("rey" in caption for caption in (spectra.caption, by_layer.caption, by_direction.caption))


def test_the_caption_tells_whether_core_directions_are_the_largest() -> None:
    s = torch.arange(10.0, 0.0, -1.0, dtype=torch.float64)
    policy = POLICIES["abs_select"]()

    def caption(g: torch.Tensor) -> str:
        module = EditedModule(s, g, policy.apply(s, g, "fc"))
        return sensitivity_by_direction([Drawn.of(module, Place(None, "fc", "fc"))]).caption

    largest_first = caption(s)
    assert "Of the 2 core directions, 100% are among the equally many largest" in largest_first
    assert "by chance it would be 20%" in largest_first
    assert "Of the 2 core directions, 0% are" in caption(1 / s)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects the figures that are drawn, in place of their pictures."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Picture, "of", lambda figure, *_: drawn.append(figure))
    return drawn


def test_the_spectra_show_each_value_before_and_after_by_role(figures: list[Figure]) -> None:
    [module] = edits(ONE, ranks=(20,)).values()
    edit = module.edit
    pictures({ONE[0]: module})
    [panel] = figures[0].axes
    shown = {line.get_color(): line.get_xydata().tolist() for line in panel.lines}
    k = torch.arange(1, 21)
    roles = {INK: k > 0, CORE: edit.core, NOISE: edit.noise, OTHER: ~(edit.core | edit.noise)}
    for colour, role in roles.items():
        values = module.s if colour == INK else edit.s_new
        assert shown[colour] == torch.stack([k, values], dim=1)[role].tolist()


def test_the_map_by_layer_shows_mean_sensitivities(figures: list[Figure]) -> None:
    edited = edits([*layers(2), "lm_head"])
    pictures(edited)
    [[image]] = [ax.images for ax in figures[1].axes if ax.images]
    means = [m.g.abs().mean().item() for m in edited.values() if m.g is not None]
    nan = float("nan")
    expected = [[nan, means[0], means[2]], [nan, means[1], means[3]], [means[4], nan, nan]]
    torch.testing.assert_close(
        torch.tensor(image.get_array().filled(nan)), torch.tensor(expected, dtype=torch.float64), equal_nan=True
    )


def test_the_map_by_direction_shows_shares_gains_and_roles(figures: list[Figure]) -> None:
    edited = edits(layers(2), ranks=(4,), noise_frac=0.5)
    pictures(edited)
    modules = [edited[name] for kind in KINDS for name in edited if name.endswith(kind)]
    shares, gains = (ax.images[0].get_array().filled() for ax in figures[2].axes if ax.images)
    g = torch.stack([m.g.abs() / m.g.abs().max() for m in modules if m.g is not None], dim=1)
    torch.testing.assert_close(torch.tensor(shares), g.clamp_min(0.01))
    torch.testing.assert_close(
        torch.tensor(gains), torch.stack([m.edit.s_new / m.s for m in modules], dim=1), atol=0.0, rtol=1e-12
    )
    mean_bars, role_bars = ([bar.get_width() for bar in ax.patches] for ax in figures[2].axes if len(ax.patches) == 8)
    core, noise = (torch.stack([getattr(m.edit, role) for m in modules]).double().mean(0) for role in ("core", "noise"))
    assert mean_bars[4:] == pytest.approx(g.mean(dim=1).tolist())
    assert role_bars == pytest.approx(torch.cat([-noise, core]).tolist())


def test_saved_pictures_are_those_of_the_report(tmp_path: Path) -> None:
    edited = edits(ONE)
    files = save_pictures(tmp_path / "a" / "b", edited)
    assert [file.name for file in files] == [f"{name}.png" for name in NAMES]
    embedded = [base64.b64decode(address.split(",")[1]) for address in read(tmp_path, edited).addresses]
    assert [file.read_bytes() for file in files] == embedded


def test_nothing_edited_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one edited module"):
        write_report(tmp_path / "new" / "report.html", "empty", {})
    with pytest.raises(ValueError, match="at least one edited module"):
        save_pictures(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_report_replaces_an_old_one_and_a_failed_one_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / "report.html"
    write_report(file, "first", edits(ONE))
    write_report(file, "second", edits(ONE))
    assert "<h1>second</h1>" in file.read_text(encoding="utf-8")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as partial:
            partial.write(data[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(file, "third", edits(ONE))
    assert "<h1>second</h1>" in file.read_text(encoding="utf-8")
    assert [found.name for found in file.parent.iterdir()] == ["report.html"]


def test_matplotlibs_settings_are_ignored_and_left_alone() -> None:
    edited = edits(ONE)
    reference = [picture.png for picture in pictures(edited)]
    with matplotlib.rc_context({"font.size": 40, "text.parse_math": False, "image.cmap": "gray", "savefig.dpi": 10}):
        assert [picture.png for picture in pictures(edited)] == reference
        assert matplotlib.rcParams["font.size"] == 40


def test_the_report_does_without_pyplot() -> None:
    code = "import sys, spectral_fast.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert report.__doc__


def test_places_of_modules() -> None:
    found = places([*layers(2), "base_model.model.lm_head"])
    assert [(place.layer, place.kind, place.label) for place in found.values()] == [
        (0, "down_proj", "0 down_proj"),
        (0, "o_proj", "0 o_proj"),
        (1, "down_proj", "1 down_proj"),
        (1, "o_proj", "1 o_proj"),
        (None, "lm_head", "lm_head"),
    ]


def test_stacks_of_layers_are_told_apart() -> None:
    found = places(["m.vision.layers.0.q", "m.text.layers.0.q", "m.head"])
    assert [place.label for place in found.values()] == ["0 vision q", "0 text q", "head"]
    found = places(["blocks.0.q", "extra.0.q", "0.q"])
    assert [place.kind for place in found.values()] == ["blocks q", "extra q", "- q"]


def test_labels_are_unique_even_where_kinds_are_not() -> None:
    names = [f"m.layers.{i}.experts.{j}.up" for i in range(2) for j in range(2)] + ["a.fc", "b.fc"]
    found = places(names)
    assert [place.label for place in found.values()] == [
        "0.experts.0.up",
        "0.experts.1.up",
        "1.experts.0.up",
        "1.experts.1.up",
        "a.fc",
        "b.fc",
    ]
    assert {place.kind for place in found.values()} == {"up", "fc"}
    assert places([]) == {}

"""The report of a sweep in a real browser: tables and plots are there, and no request leaves. `make test-browser`."""

from __future__ import annotations

from pathlib import Path

import pytest
from devtools import browser, executable
from sweep_tools import sweep, write_configs

LINES = [{"edit_mode": "abs_select", "amp_factor": [1.1, 1.5]}, {"edit_mode": "gd"}]


def test_the_report_of_a_sweep_opens_without_a_network(tmp_path: Path) -> None:
    program = executable()
    if program is None:
        pytest.skip("no Chromium here; Debian's package is called chromium")
    sweep(write_configs(tmp_path, LINES), tmp_path / "out", controls=5)
    with browser(program, tmp_path / "profile") as page:
        page.open(tmp_path / "out" / "report.html")
        assert page.evaluate("document.title") == "Sweep"
        # The original, 3 variants, and 5 controls for each of two pairs of factors and the defaults.
        assert page.evaluate("document.querySelectorAll('table tbody tr').length") == 1 + 3 + 15
        head = page.evaluate("[...document.querySelectorAll('thead th')].map(cell => cell.textContent)")
        assert {"score", "standard error", "95 % interval", "p (Holm)", "verdict"} <= set(head)
        titles = page.evaluate("[...document.images].map(image => image.alt)")
        assert {"Variants beside random edits", "Score against each hyperparameter"} <= set(titles)
        assert sum("singular values before and after" in title for title in titles) == 3
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert min(widths) > 300
        page.evaluate("document.querySelector('details').open = true")
        texts = page.evaluate("[...document.querySelectorAll('.flip pre')].map(text => text.textContent)")
        assert any("<b>&</b>" in text for text in texts)  # as text, for
        assert page.evaluate("document.querySelectorAll('.flip b').length") == 0
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        outside = [url[:80] for url in page.requests if not url.startswith(("file:", "data:", "about:"))]
        assert outside == []
        assert page.complaints == []

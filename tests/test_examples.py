"""The examples run as they stand, print what they promise, and leave the files that they name."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"

# Example -> lines that it prints, as regular expressions in this order, and what it leaves.
# None is called kernels.py: a script's folder comes first, and transformers imports a package of that name.
EXPECTED: dict[str, tuple[list[str], list[str]]] = {
    "edit_and_evaluate": (
        [
            "8 of 20 modules, rank 32",
            r"the largest \|g\| is 0\.\d+, of direction \d+",
            "6 directions amplified, 6 suppressed",
            r"original +\d+ of 16",
            r"control +\d+ of 16",
            r"\(p = ",
        ],
        [
            "probed/sensitivity.safetensors",
            "edited/spectral_edit_meta.json",
            "control/adapter_config.json",
            "report.html",
        ],
    ),
    "probe_statistics": (
        [
            r"parts of g \(64, 32\)",
            r"in \d+ of 32 directions",
            r"64 samples: \d+% of the choice",
            r"p = 0\.\d+ that",
            "samples were used; stable: True",
        ],
        [],
    ),
    "sweep": (
        [
            "2 configurations",
            "0 are finished, 4 to do",
            "original",
            "smooth_abs",
            "random_index",
            "4 are finished, 0 to do",
        ],
        ["sweep/report.html", "sweep/results.json", "sweep/ledger.jsonl"],
    ),
    "merge_and_resize": (
        [
            "r 32, .* 90 % of the energy in 6 directions",
            "rank 8: error up to 35",
            "cosine 0.9",
            "cat: rank 40, error 0.0%",
            r"svd: rank 16, error up to \d+\.\d%",
            "r 16, lora_alpha 16, patterns {}",
        ],
        ["r8", "energy", "clipped", "cat", "merged", "exported/adapter_model.safetensors"],
    ),
    "adaptive_ranks": (
        ["alpha_hill", r"[\d,]+ parameters, ranks 4 to \d+", r"q_proj: rank \d+", "ranks.png"],
        ["pictures/ranks.png"],
    ),
    "gated_training": (
        [
            r"all 24 micro-batches, loss \d",
            r"\d+ of 24 micro-batches accepted",
            "of micro-batches rejected",
            r"novelties \[1\.0, ",
        ],
        ["plain/final_checkpoint/adapter_config.json", "gated/gate_metrics.json", "reports/analysis.md"],
    ),
    "spline_lora": (
        ["72 of 23,368 parameters", r"mean \|v - k\| 0\.0\d", "72 parameters, penalty", "instead of"],
        ["trained/final_checkpoint", "splines.png"],
    ),
    "kernels_called_directly": (
        [
            f"{name} +error .* ms"
            for name in ("lowrank_svd", "recompose", "batched_svd", "spectral_linear", "spline", "head_sketch")
        ],
        [],
    ),
}


def test_every_example_is_known() -> None:
    assert EXPECTED.keys() == {file.stem for file in FOLDER.glob("*.py")}
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}.py]({name}.py)" in readme for name in EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed, files = EXPECTED[name]
    out = capsys.readouterr().out
    begin = 0
    for line in printed:
        found = re.compile(line).search(out, begin)
        assert found, f"{line!r} is not in what {name}.py printed after {out[:begin]!r}: {out[begin:]!r}"
        begin = found.end()
    assert [file for file in files if not Path(file).exists()] == []

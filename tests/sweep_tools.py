"""A sweep without a model: problems, configurations, and an engine whose answers depend on the adapter's weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from spectral_fast import embedded
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.evaluation.engines import EngineOptions
from spectral_fast.sweep import Settings, load_configs, run_sweep

PROBLEMS = 40


class FakeEngine:
    """Solves a problem or not by a hash of the prompt and the adapter's bytes; edits move a tenth of the answers."""

    name: ClassVar[str] = "fake"
    calls: ClassVar[list[int]] = []  # adapters of every call of any engine
    started: ClassVar[int] = 0

    def __init__(self, *_: Any) -> None:
        type(self).started += 1
        self.settings: Mapping[str, Any] = {"dtype": "float32"}

    def generate(
        self, prompts: Sequence[str], sampling: Any, adapters: Sequence[Path], *, progress: Any = None
    ) -> list[list[str]]:
        assert progress is None
        hashes = {
            folder: sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest() for folder in adapters
        }
        self.calls.append(len(hashes))
        texts = []
        for prompt, folder in zip(prompts, adapters, strict=True):
            number = re.findall(r"<(\d+)>", prompt)[-1]
            base = _draw(number) < 6
            answers = [
                number if base != (_draw(f"{number} {hashes[folder]} {sampling.seed} {j}") == 0) else -1
                for j in range(sampling.n)
            ]
            template = "    return {}\n" if prompt.startswith("def ") else " <b>&</b> {0}\n#### {0}"
            texts.append([template.format(answer) for answer in answers])
        return texts

    def close(self) -> None:
        pass


def _draw(text: str) -> int:
    return int(sha256(text.encode()).hexdigest(), 16) % 10


def problems_file(folder: Path, count: int = PROBLEMS) -> Path:
    path = folder / "problems.jsonl"
    rows = [{"question": f"What is <{i}>?", "answer": f"#### {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def programs_file(folder: Path, count: int) -> Path:
    path = folder / "programs.jsonl"
    rows = [
        {
            "task_id": f"Number/{i}",
            "prompt": f'def f():\n    """Return <{i}>."""\n',
            "entry_point": "f",
            "test": f"def check(candidate):\n    assert candidate() == {i}\n",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def common(folder: Path) -> dict[str, Any]:
    """Keys of every configuration."""
    return {
        "base_model": str(embedded.base_model_dir()),
        "lora_local_path": str(embedded.adapter_dir()),
        "calib_data": str(embedded.calibration_file()),
        "calib_samples": 2,
        "eval_data": str(problems_file(folder)),
        "eval_fewshot": 0,
        "layer_min": 3,
    }


def write_configs(folder: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / "configs.jsonl"
    shared = common(folder)
    path.write_text("".join(json.dumps({**shared, **line}) + "\n" for line in lines))
    return path


def sweep(
    configs: Path, out_dir: Path, group: int = 4, engine: type[FakeEngine] = FakeEngine, **options: Any
) -> dict[str, Any]:
    settings = Settings(
        out_dir, ModelOptions(), EngineOptions(engine="transformers", max_loras=group), open_engine=engine
    )
    return run_sweep(load_configs(configs, {}), settings, **options)


def tables(out_dir: Path) -> dict[str, bytes]:
    """All that a sweep ends with, but for the ledger's times."""
    names = ["results.json", "results.jsonl", "summary.csv", "summary.tsv", "summary_table.md", "report.html"]
    return {name: (out_dir / name).read_bytes() for name in names}

"""A sweep of 8 variants with vLLM on the embedded model: one engine, and the answers of the transformers engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectral_fast import embedded
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.evaluation.engines import Engine, EngineOptions, open_engine
from spectral_fast.sweep import Settings, load_configs, run_sweep

VARIANTS = {"edit_mode": "abs_select", "amp_factor": [1.1, 1.25, 1.5, 2.0], "sup_factor": [0.5, 0.8]}


def test_eight_variants_run_together_in_one_engine_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    started = []

    def counted(*arguments: Any) -> Engine:
        started.append(arguments)
        return open_engine(*arguments)

    shared = {
        "base_model": str(embedded.base_model_dir()),
        "lora_local_path": str(embedded.adapter_dir()),
        "calib_data": str(embedded.calibration_file()),
        "calib_samples": 8,
        "eval_data": str(embedded.heldout_file()),
        "eval_fewshot": 0,
        "eval_max_samples": 32,
        "eval_max_tokens": 96,
    }
    configs = tmp_path / "configs.jsonl"
    configs.write_text(json.dumps({**shared, **VARIANTS}) + "\n" + json.dumps({**shared, "edit_mode": "baseline"}))

    def run(engine: str, out_dir: Path) -> dict[str, Any]:
        options = EngineOptions(engine=engine, max_model_len=512, max_loras=9, enforce_eager=True)
        settings = Settings(out_dir, ModelOptions(dtype="fp32"), options, open_engine=counted)
        return run_sweep(load_configs(configs, {}), settings, controls=0)

    result = run("vllm", tmp_path / "vllm")
    assert len(started) == 1
    assert [run["role"] for run in result["runs"]].count("variant") == 8
    assert (
        len((tmp_path / "vllm" / "ledger.jsonl").read_text().splitlines()) == 1
    )  # 8 variants and the original at once
    assert run("vllm", tmp_path / "vllm") == result
    assert len(started) == 1

    same = run("transformers", tmp_path / "transformers")
    records = [
        {one["id"]: one["scores"] for line in (tmp_path / name / "ledger.jsonl").read_text().splitlines()
         for one in json.loads(line)["runs"]}
        for name in ("vllm", "transformers")
    ]  # fmt: skip
    pairs = [
        (records[0][first["run"]][problem], records[1][second["run"]][problem])
        for first, second in zip(result["runs"], same["runs"], strict=True)
        for problem in records[0][first["run"]]
    ]
    assert len(pairs) == 9 * 32
    assert sum(a == b for a, b in pairs) >= 0.99 * len(pairs)

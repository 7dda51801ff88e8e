"""What the toolbox writes, in vLLM: the same texts as with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.edit import edit_adapter
from spectral_fast.evaluation.evaluate import Gsm8k
from spectral_fast.evaluation.profiles import EvaluationOptions
from spectral_fast.policies import RandomIndex
from spectral_fast.toolbox.export import export_adapter
from spectral_fast.toolbox.extraction import ExtractOptions, extract_adapter
from spectral_fast.toolbox.merging import MergeOptions, merge_adapters
from spectral_fast.toolbox.resize import ResizeOptions, resize_adapter

SOURCE = embedded.adapter_dir()


def edited(folder: Path) -> Adapter:
    edit_adapter(Adapter.open(SOURCE), RandomIndex(seed=3, amp_factor=1.6, sup_factor=0.4), folder)
    return Adapter.open(folder)


def merged(folder: Path, **options: Any) -> Path:
    sources = [Adapter.open(SOURCE), edited(folder.with_name("edited"))]
    merge_adapters(sources, [0.6, 0.4], MergeOptions(**options), folder)
    return folder


def exported(folder: Path) -> Path:
    small = folder.with_name("small")
    resize_adapter(Adapter.open(SOURCE), ResizeOptions(energy=0.9), small)
    export_adapter(Adapter.open(small), folder)
    return folder


def extracted(folder: Path) -> Path:
    """From the base model and a copy with the adapter merged in, with ranks that differ."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(embedded.base_model_dir()), str(SOURCE))
    tuned.merge_and_unload().save_pretrained(folder.with_name("tuned"))
    options = ExtractOptions(error=0.3)
    found = extract_adapter(str(embedded.base_model_dir()), str(folder.with_name("tuned")), options, folder)
    assert len(set(found.ranks.values())) > 1
    return folder


MADE = {
    "of one rank": lambda folder: merged(folder, method="svd", rank=16),
    "of mixed ranks": lambda folder: merged(folder, method="svd", energy=0.9),
    "in core space": lambda folder: merged(folder, method="core_ties", density=0.7, rank=32),
    "resized and exported": exported,
    "extracted": extracted,
}


@pytest.mark.parametrize("make", MADE)
def test_vllm_and_transformers_say_the_same_with_what_was_made(
    engine: Any, peer: Any, tmp_path: Path, make: str
) -> None:
    folder = MADE[make](tmp_path / "made")
    options = EvaluationOptions(eval_data=str(embedded.heldout_file()), fewshot=0, max_samples=12, max_tokens=110)
    problems, shots = options.load()
    task = Gsm8k(problems, shots, options.profile(None))
    assert engine.generate(task.prompts, task.sampling, folder) == peer.generate(task.prompts, task.sampling, folder)

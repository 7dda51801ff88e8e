"""Goals and checkpoints that no LoRA can be extracted of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from extract_tools import low_rank, two_models
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

from spectral_fast.toolbox.extraction import ExtractOptions, extract_adapter


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({}, "got none"),
        ({"rank": 3, "error": 0.1}, "rank=3, error=0.1"),
        ({"rank": 0}, "rank"),
        ({"energy": 2.0}, "energy"),
    ],
)
def test_goals_that_cannot_be_meant_are_refused(goal: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExtractOptions(**goal)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    options, out = ExtractOptions(rank=3), tmp_path / "lora"
    with pytest.raises(ValueError, match="none of 21 linear layers differs"):
        extract_adapter(base, base, options, out, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    with pytest.raises(ValueError, match="nope is no linear layer of LlamaForCausalLM, which has q_proj"):
        extract_adapter(base, tuned, options, out, target_modules=["nope"])
    tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"\(80, 48\) in .*base, but \(64, 48\) in .*other"):
        extract_adapter(base, str(tmp_path / "other"), options, out)
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"has no weights for model\.layers\.2"):
        extract_adapter(base, str(tmp_path / "short"), options, out)
    for name, change in (("quantised", {"quantization_config": {"quant_method": "fp8"}}), ("empty", None)):
        (tmp_path / name).mkdir()
        config = json.loads(Path(base, "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **(change or {})}))
    with pytest.raises(ValueError, match="is quantised"):
        extract_adapter(base, str(tmp_path / "quantised"), options, out)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        extract_adapter(base, str(tmp_path / "empty"), options, out)
    assert not out.exists()


def change_in(folder: str, key: str, value: float) -> None:
    file = next(f for f in Path(folder).glob("*.safetensors") if key in load_file(f))
    tensors = load_file(file)
    tensors[key].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    key = "model.layers.1.self_attn.q_proj.weight"
    change_in(tuned, key, torch.inf)
    with pytest.raises(ValueError, match=rf"{key}: .* NaN or infinite"):
        extract_adapter(base, tuned, ExtractOptions(rank=3), tmp_path / "lora")


@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
def test_values_that_are_not_finite_are_refused_where_no_lora_goes_too(tmp_path: Path, key: str) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    change_in(tuned, key, torch.nan)
    with pytest.raises(ValueError, match=rf"{key}: .* NaN or infinite"):
        extract_adapter(base, tuned, ExtractOptions(rank=3), tmp_path / "lora", modules_to_save=True)


def test_factors_that_leave_the_range_of_their_dtype_are_refused(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    base, tuned = two_models(tmp_path, low_rank)
    change_in(tuned, key, 1e12)
    with pytest.raises(ValueError, match=rf"{key}: .* range of torch.float16, 6.55e\+04; give another dtype"):
        extract_adapter(base, tuned, ExtractOptions(rank=3, dtype="float16"), tmp_path / "lora")
    assert extract_adapter(base, tuned, ExtractOptions(rank=3), tmp_path / "lora").ranks


def test_an_embedding_of_another_length_is_named(tmp_path: Path) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    longer = tiny_llama()
    with torch.no_grad():
        for name, parameter in longer.named_parameters():
            parameter += low_rank(name, parameter)
    longer.resize_token_embeddings(101, mean_resizing=False)
    longer.save_pretrained(tmp_path / "longer")
    found = extract_adapter(
        base, str(tmp_path / "longer"), ExtractOptions(rank=3), tmp_path / "lora", modules_to_save=True
    )
    assert found.lost.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "(97, 48) in" in found.lost["lm_head.weight"]
    assert len(found.ranks) == 21
    assert tuned

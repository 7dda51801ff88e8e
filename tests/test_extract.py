"""LoRA from two checkpoints: near the best of its rank, what it says of its error, and what it cannot hold."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extract_tools import low_rank, randn, two_models
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import Tensor

from spectral_fast.adapter import Adapter
from spectral_fast.cli import main
from spectral_fast.tensorfile import TensorInfo
from spectral_fast.toolbox import extraction
from spectral_fast.toolbox.extraction import (
    META,
    Extraction,
    ExtractOptions,
    checkpoints,
    extract,
    extract_adapter,
    parts,
)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(torch.arange(18).reshape(2, 9)).logits
    return result


def differences(base: str, tuned: str) -> dict[str, Tensor]:
    """Module -> its difference in float64, of every projection."""
    from transformers import AutoModelForCausalLM

    before, after = (dict(AutoModelForCausalLM.from_pretrained(x).named_parameters()) for x in (base, tuned))
    return {
        name.removesuffix(".weight"): (after[name].double() - before[name].double()).detach()
        for name in before
        if name.endswith("proj.weight")
    }


def updates(folder: Path) -> dict[str, Tensor]:
    """Module -> scaling · B A in float64."""
    adapter = Adapter.open(folder)
    return {
        name.removeprefix("base_model.model."): module.scaling * b.double() @ a.double()
        for name, module in adapter.modules.items()
        for b, a in [adapter.read(module)]
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_makes_the_tuned_model_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = two_models(tmp_path, low_rank, dtype=dtype)
    found = extract_adapter(base, tuned, ExtractOptions(rank=3), tmp_path / "lora")
    adapter = Adapter.open(tmp_path / "lora")
    assert {module.dtype for module in adapter.modules.values()} == {dtype}
    assert {(module.r, module.scaling) for module in adapter.modules.values()} == {(3, 1.0)}
    assert adapter.config["target_modules"] == sorted({name.rpartition(".")[2] for name in found.ranks})
    assert adapter.config["task_type"] == "CAUSAL_LM"
    expected = differences(base, tuned)
    made = updates(tmp_path / "lora")
    assert made.keys() == expected.keys()
    for name, d in expected.items():
        error = ((made[name] - d).norm() / d.norm()).item()
        best = (torch.linalg.svdvals(d)[3:].norm() / d.norm()).item()
        rounding = 2 * torch.finfo(dtype).eps + 30 * 3 * torch.finfo(torch.float32).eps  # of the factors, of the SVD
        assert error <= 1.02 * best + rounding
        told = found.modules[name].error / found.modules[name].norm
        assert told == pytest.approx(best, rel=0.05, abs=1e-6)
    if dtype == torch.float32:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
        torch.testing.assert_close(
            logits(model), logits(AutoModelForCausalLM.from_pretrained(tuned)), rtol=0, atol=2e-3
        )


@pytest.mark.parametrize("goal", [{"energy": 0.9}, {"error": 0.2}])
def test_ranks_are_the_smallest_that_reach_the_goal_and_peft_loads_them(tmp_path: Path, goal: dict[str, float]) -> None:
    def decaying(name: str, weight: Tensor) -> Tensor:
        rank = 3 + sum(map(ord, name)) % 9
        return low_rank(name, weight, rank)

    base, tuned = two_models(tmp_path, decaying)
    found = extract_adapter(base, tuned, ExtractOptions(**goal), tmp_path / "lora")
    assert len(set(found.ranks.values())) > 3
    share = 1 - goal["energy"] if "energy" in goal else goal["error"] ** 2
    for name, d in differences(base, tuned).items():
        energies = torch.linalg.svdvals(d).square()
        tails = energies.flip(0).cumsum(0).flip(0) / energies.sum()
        k = found.ranks[name]
        assert k == len(energies) or tails[k] <= share * 1.0001
        assert tails[k - 1] > share * 0.9999
        assert found.modules[name].reached
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    for name, delta in updates(tmp_path / "lora").items():
        layer = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, rtol=0, atol=1e-5)


def test_more_directions_are_looked_for_until_the_goal_is_met_or_the_largest_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = two_models(tmp_path, lambda name, weight: low_rank(name, weight, 30))
    monkeypatch.setattr(extract, "_START", 2)
    options = ExtractOptions(error=0.01, oversampling=2)
    found = extract_adapter(base, tuned, options, tmp_path / "lora")
    assert all(20 <= r <= 30 for r in found.ranks.values())
    assert all(x.reached for x in found.modules.values())
    few = extract_adapter(base, tuned, ExtractOptions(error=0.01, max_rank=6), tmp_path / "few")
    assert set(few.ranks.values()) == {6}
    assert not any(x.reached for x in few.modules.values())


def test_what_lora_cannot_hold_is_named_or_saved_in_full(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def change(name: str, weight: Tensor) -> Tensor:
        if name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
            return 0.1 * randn(*weight.shape)
        return low_rank(name, weight) if "layers.0" in name else torch.zeros(())

    base, tuned = two_models(tmp_path, change, lambda: tiny_llama(tie_word_embeddings=True))
    named = extract_adapter(base, tuned, ExtractOptions(rank=3), tmp_path / "named")
    assert named.lost == {
        "model.embed_tokens.weight": "an embedding",
        "model.layers.1.input_layernorm.weight": "a weight of LlamaRMSNorm: a vector has no factors",
        "model.norm.weight": "a weight of LlamaRMSNorm: a vector has no factors",
    }
    assert len(named.equal) == 14
    assert all(".layers.0." in name for name in named.ranks)
    saved = extract_adapter(base, tuned, ExtractOptions(rank=3), tmp_path / "saved", modules_to_save=True)
    assert (saved.lost, saved.saved) == ({}, list(named.lost))
    with pytest.warns(UserWarning, match="tied"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "saved"))
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tuned)), rtol=0, atol=2e-3)


def test_a_bias_beside_an_adapted_weight_is_named_and_not_saved(tmp_path: Path) -> None:
    def change(name: str, weight: Tensor) -> Tensor:
        return randn(*weight.shape) if name.endswith("q_proj.bias") else low_rank(name, weight)

    base, tuned = two_models(tmp_path, change, lambda: tiny_llama(attention_bias=True))
    found = extract_adapter(base, tuned, ExtractOptions(rank=3), tmp_path / "lora", modules_to_save=True)
    assert set(found.lost) == {f"model.layers.{i}.self_attn.q_proj.bias" for i in range(3)}
    assert not found.saved


def test_gpt2_whose_weights_are_stored_transposed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    def gpt2() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=24, n_layer=2, n_head=2))

    def change(name: str, weight: Tensor) -> Tensor:
        return (
            0.1 * randn(weight.shape[0], 2) @ randn(2, weight.shape[1])
            if "c_" in name and weight.ndim == 2
            else 0 * weight
        )

    base, tuned = two_models(tmp_path, change, gpt2)
    found = extract_adapter(base, tuned, ExtractOptions(rank=2), tmp_path / "lora")
    assert Adapter.open(tmp_path / "lora").config["fan_in_fan_out"] is True
    assert len(found.ranks) == 8
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tuned)), rtol=0, atol=2e-3)


def test_the_head_is_adapted_if_it_is_asked_for_and_a_larger_rank_than_a_side_is_cut(tmp_path: Path) -> None:
    def change(name: str, weight: Tensor) -> Tensor:
        return 0.1 * randn(*weight.shape) if name == "lm_head.weight" or "k_proj" in name else torch.zeros(())

    base, tuned = two_models(tmp_path, change)
    found = extract_adapter(base, tuned, ExtractOptions(rank=60), tmp_path / "all")
    assert found.lost == {"lm_head.weight": "not among --target_modules"}
    assert set(found.ranks.values()) == {24}
    both = extract_adapter(
        base, tuned, ExtractOptions(rank=60), tmp_path / "both", target_modules=["lm_head", "k_proj"]
    )
    assert both.ranks["lm_head"] == 48
    assert not both.lost
    d = differences(base, tuned)
    for name, delta in updates(tmp_path / "both").items():
        if name in d:
            torch.testing.assert_close(delta, d[name], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")  # PEFT's, of a base that ties them
@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_one_of_two_may_tie_its_head_to_the_embedding(tmp_path: Path, before: bool, after: bool) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_llama(tie_word_embeddings=before).save_pretrained(base)
    model = tiny_llama(tie_word_embeddings=after)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += low_rank(name, parameter)
        model.model.embed_tokens.weight += 0.1
    model.save_pretrained(tuned)
    options = ExtractOptions(rank=48)
    found = extract_adapter(str(base), str(tuned), options, tmp_path / "lora", modules_to_save=True)
    assert found.saved == ["model.embed_tokens.weight", "lm_head.weight"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tuned)), rtol=0, atol=2e-3)


def test_a_head_that_is_asked_for_and_is_the_embedding_is_told_of(tmp_path: Path) -> None:
    def change(name: str, weight: Tensor) -> Tensor:
        return 0.1 * randn(*weight.shape) if "embed" in name or "k_proj" in name else torch.zeros(())

    base, tuned = two_models(tmp_path, change, lambda: tiny_llama(tie_word_embeddings=True))
    options, targets = ExtractOptions(rank=2), ["lm_head", "k_proj"]
    found = extract_adapter(base, tuned, options, tmp_path / "lora", target_modules=targets)
    assert found.lost == {"model.embed_tokens.weight": "an embedding, and lm_head.weight is the same tensor"}


def test_two_dtypes_are_told_of_and_float64_is_worked_on_as_such(tmp_path: Path) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    wide = tiny_llama().double()
    wide.save_pretrained(tmp_path / "wide")
    found = extract_adapter(str(tmp_path / "wide"), tuned, ExtractOptions(rank=3, dtype="float32"), tmp_path / "lora")
    assert found.warnings
    assert "are float64 in" in found.warnings[0]
    assert all(x.error <= 1e-5 * x.norm for x in found.modules.values())
    assert Adapter.open(tmp_path / "lora").modules
    assert base


class Stop(Exception):
    pass


def test_a_run_that_was_ended_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    monkeypatch.setattr(parts, "_LONGEST", -1.0)  # every module is written at once
    monkeypatch.setattr(extract, "batches", lambda items, _: ([item] for item in items))
    done: list[str] = []
    whole = extract._extract

    def counted(batch: Any, options: ExtractOptions) -> Any:
        if len(done) == 5:
            raise Stop
        done.extend(pair.name for pair in batch)
        return whole(batch, options)

    monkeypatch.setattr(extract, "_extract", counted)
    work, options = tmp_path / "work", ExtractOptions(rank=3)

    def run(**others: Any) -> Extraction:
        arguments = {"options": options, "out_dir": tmp_path / "lora", "work_dir": work, **others}
        return extract_adapter(base, tuned, **arguments)

    with pytest.raises(Stop):
        run()
    assert len(done) == 5
    assert not (tmp_path / "lora").exists()
    with pytest.raises(FileExistsError, match="--resume"):
        run()
    with pytest.raises(ValueError, match="rank was 3, now it is 4"):
        run(options=ExtractOptions(rank=4), resume=True)
    first, done[:] = list(done), []
    monkeypatch.setattr(
        extract, "_extract", lambda batch, options: done.extend(x.name for x in batch) or whole(batch, options)
    )
    found = run(resume=True)
    assert len(done) == 21 - 5
    assert not set(done) & set(first)
    assert not work.exists()
    again = extract_adapter(base, tuned, options, tmp_path / "again")
    assert again.ranks == found.ranks
    left, right = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("lora", "again"))
    assert all(torch.equal(left[key], right[key]) for key in left)  # whatever was done when


def test_a_changed_checkpoint_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    monkeypatch.setattr(parts, "_LONGEST", -1.0)
    monkeypatch.setattr(extract, "batches", lambda items, _: ([item] for item in items))
    arguments = (base, tuned, ExtractOptions(rank=3), tmp_path / "lora")

    def stopping(pairs: Any) -> Iterator[Any]:
        yield from pairs[:20]
        raise Stop

    with pytest.raises(Stop):
        extract_adapter(*arguments, work_dir=tmp_path / "work", progress=stopping)
    shard = next(Path(tuned).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match="tuned_model changed"):
        extract_adapter(*arguments, work_dir=tmp_path / "work", resume=True)


def thousands(count: int) -> checkpoints.Checkpoints:
    """Tiny matrices in memory, as of experts."""
    bases = randn(count, 12, 8)
    tuned = bases + randn(count, 12, 2, seed=1) @ randn(count, 2, 8, seed=2)
    info = TensorInfo(torch.float32, (12, 8))
    pairs = [
        checkpoints.Pair(f"model.layers.{i}.expert.weight", info, lambda i=i: bases[i], lambda i=i: tuned[i])
        for i in range(count)
    ]
    return checkpoints.Checkpoints(pairs, [], set(), "ForCausalLM", ([], []), [])


def test_thousands_of_tiny_modules_take_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "open_checkpoints", lambda *_: thousands(3_000))
    start = time.process_time()
    found = extract_adapter("base", "tuned", ExtractOptions(rank=2), tmp_path / "lora", work_dir=tmp_path / "work")
    assert time.process_time() - start < 10 / 4  # 12,000 of them in 10 s
    assert len(found.ranks) == 3_000
    assert max(x.error / x.norm for x in found.modules.values()) < 1e-5


def test_the_command_tells_what_it_found_and_keeps_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    out = tmp_path / "lora"
    command = ["extract", "--base_model", base, "--tuned_model", tuned, "--out_dir", str(out), "--rank", "3"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ranks"] == [3, 3]
    assert result["error_most"] < 1e-5
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", META]
    meta = json.loads((out / META).read_text())
    assert meta["meta"]["rank"] == 3
    assert set(meta["meta"]["files_sha256"]) == {"base_model", "tuned_model"}
    assert len(meta["modules"]) == 21
    assert not (tmp_path / "lora.unfinished").exists()
    assert main(command) == 1
    assert "not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert "extracted 21 modules, rank 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(command[:-2])
    assert "give one of rank, energy and error" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--max_rank", "8"])
    assert "--max_rank is for --energy and --error" in capsys.readouterr().err
    assert extraction.META == META

"""vLLM beside transformers on the embedded model: the same answers, adapter by adapter, and clear refusals."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.calibration.model import ModelOptions
from spectral_fast.cli import main
from spectral_fast.edit import edit_adapter
from spectral_fast.evaluation.engines import EngineOptions, Sampling, open_engine
from spectral_fast.evaluation.evaluate import Gsm8k
from spectral_fast.evaluation.profiles import EvaluationOptions
from spectral_fast.policies import RandomIndex

ADAPTER = embedded.adapter_dir()
NEAR_TIE = 1e-3  # of logits: float32 products in another order differ by 1e-5 of logits of about 10, layer upon layer


def gsm8k(max_samples: int) -> Gsm8k:
    options = EvaluationOptions(
        eval_data=str(embedded.heldout_file()), fewshot=0, max_samples=max_samples, max_tokens=110
    )
    problems, shots = options.load()
    return Gsm8k(problems, shots, options.profile(None))


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("variants")
    adapter = Adapter.open(ADAPTER)
    for seed in range(8):
        policy = RandomIndex(seed=seed, amp_factor=1.6, sup_factor=0.4)
        edit_adapter(adapter, policy, folder / str(seed), modules=adapter.select("all"))
    return [folder / str(seed) for seed in range(8)]


def test_both_engines_give_the_same_answers_in_float32(engine: Any, peer: Any, tmp_path: Path) -> None:
    task = gsm8k(-1)
    texts, rows = {}, {}
    for one in (engine, peer):
        began = time.perf_counter()
        texts[one.name] = one.generate(task.prompts, task.sampling, ADAPTER)
        print(f"{one.name}: {len(task.prompts)} problems in {time.perf_counter() - began:.1f} s, {dict(one.settings)}")
        result = task.record(texts[one.name], tmp_path, engine=one, variant=one.name)
        rows[one.name] = [json.loads(line) for line in Path(result["predictions_path"]).read_text().splitlines()]
        config = json.loads(Path(result["config_path"]).read_text())
        assert config["engine"] == one.name
        assert config["engine_settings"]["dtype"] == "float32"
    differing = [i for i, (a, b) in enumerate(zip(texts["vllm"], texts["transformers"], strict=True)) if a != b]
    answers = sum(a["pred"] == b["pred"] for a, b in zip(rows["vllm"], rows["transformers"], strict=True))
    print(f"same answer {answers} of {len(task.prompts)}, same text {len(task.prompts) - len(differing)}")
    assert answers >= 0.99 * len(task.prompts)
    for i in differing:  # each is a near tie at the first token that differs
        margin = first_margin(peer, task.prompts[i], texts["vllm"][i][0], texts["transformers"][i][0])
        print(f"problem {i}: the two tokens' logits are {margin:.2e} apart")
        assert margin < NEAR_TIE


def first_margin(peer: Any, prompt: str, one: str, other: str) -> float:
    """How far apart the logits are of the first tokens in which two continuations differ (a character is a token)."""
    tokenizer = peer._tokenizer
    ids = [tokenizer(prompt + text)["input_ids"] + [tokenizer.eos_token_id] for text in (one, other)]
    k = next(k for k, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    with closing(peer._each([ADAPTER])) as each, torch.inference_mode():
        _, model = next(each)
        logits = model(torch.tensor([ids[0][:k]])).logits[0, -1]
        return float((logits[ids[0][k]] - logits[ids[1][k]]).abs())


def test_eight_adapters_together_answer_as_each_alone(engine: Any, peer: Any, variants: list[Path]) -> None:
    task = gsm8k(12)
    prompts = [prompt for _ in variants for prompt in task.prompts]
    folders = [folder for folder in variants for _ in task.prompts]
    counts: list[int] = []
    together = engine.generate(prompts, task.sampling, folders, progress=counts.append)
    assert sum(counts) == len(prompts)
    alone = [text for folder in variants for text in engine.generate(task.prompts, task.sampling, folder)]
    by_peer = [text for folder in variants for text in peer.generate(task.prompts, task.sampling, folder)]
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 0.99 * len(prompts)
    assert sum(a == b for a, b in zip(together, by_peer, strict=True)) >= 0.99 * len(prompts)
    n = len(task.prompts)
    assert len({json.dumps(together[i : i + n]) for i in range(0, len(together), n)}) == 8, "the edits shall differ"


def test_the_base_model_runs_beside_adapters(engine: Any, peer: Any) -> None:
    task = gsm8k(8)
    folders = [None, ADAPTER] * 4
    mixed = engine.generate(task.prompts, task.sampling, folders)
    assert mixed == peer.generate(task.prompts, task.sampling, folders)
    assert mixed[::2] == engine.generate(task.prompts[::2], task.sampling)
    assert mixed[::2] != engine.generate(task.prompts[::2], task.sampling, ADAPTER)


def test_an_adapter_that_was_replaced_is_read_anew(engine: Any, peer: Any, tmp_path: Path) -> None:
    task, adapter, texts = gsm8k(16), Adapter.open(ADAPTER), []
    for seed in (1, 2):
        policy = RandomIndex(seed=seed, amp_factor=2.0, sup_factor=0.2)
        edit_adapter(adapter, policy, tmp_path / "edited", modules=adapter.select("all"), overwrite=True)
        texts.append(engine.generate(task.prompts, task.sampling, tmp_path / "edited"))
        assert texts[-1] == peer.generate(task.prompts, task.sampling, tmp_path / "edited")
    assert texts[0] != texts[1]


def test_texts_stop_at_the_same_strings(engine: Any, peer: Any) -> None:
    task = gsm8k(16)
    sampling = Sampling(110, stop=("\n", " have", "####"))
    texts = engine.generate(task.prompts, sampling, ADAPTER)
    assert texts == peer.generate(task.prompts, sampling, ADAPTER)
    assert not any(stop in text for [text] in texts for stop in sampling.stop)
    assert all(text.startswith(" ") for [text] in texts)


def test_samples_depend_on_the_seed_and_the_prompt_alone(engine: Any) -> None:
    task = gsm8k(6)
    sampling = Sampling(60, temperature=2.0, seed=7, n=4)
    first = engine.generate(task.prompts, sampling, ADAPTER)
    assert [len(set(texts)) for texts in first] == [4] * 6
    assert engine.generate(task.prompts[::-1], sampling, ADAPTER) == first[::-1]
    assert engine.generate(task.prompts, Sampling(60, 2.0, seed=8, n=4), ADAPTER) != first
    assert engine.generate(task.prompts[:2], Sampling(60, n=3), ADAPTER) == [
        texts * 3 for texts in engine.generate(task.prompts[:2], Sampling(60), ADAPTER)
    ]


def test_ranks_and_scalings_of_single_modules_are_served_as_peft_does(engine: Any, peer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(embedded.base_model_dir(), dtype=torch.float32)
    patterns = {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 24}, "alpha_pattern": {"o_proj": 40}}
    targets = ["q_proj", "o_proj", "down_proj"]
    lora = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=targets, use_rslora=True, **patterns))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    lora.save_pretrained(tmp_path / "patterns")
    task = gsm8k(16)
    texts = engine.generate(task.prompts, task.sampling, tmp_path / "patterns")
    assert texts == peer.generate(task.prompts, task.sampling, tmp_path / "patterns")
    assert texts != engine.generate(task.prompts, task.sampling)


def test_what_cannot_be_served_is_refused_and_the_engine_goes_on(engine: Any, tmp_path: Path) -> None:
    from tiny_models import tiny_llama, with_lora

    task = gsm8k(2)
    with_lora(tiny_llama(), r=33).save_pretrained(tmp_path / "large")
    with_lora(tiny_llama(), use_dora=True).save_pretrained(tmp_path / "dora")
    with_lora(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "other")
    before = engine.generate(task.prompts, task.sampling, ADAPTER)
    with pytest.raises(ValueError, match=r"rank 33.*up to 32.*--max_lora_rank"):
        engine.generate(task.prompts, task.sampling, tmp_path / "large")
    with pytest.raises(ValueError, match=r"DoRA.*--engine transformers"):
        engine.generate(task.prompts, task.sampling, tmp_path / "dora")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        engine.generate(task.prompts, task.sampling, tmp_path / "nothing")
    with pytest.raises(ValueError, match="nothing is truncated"):
        engine.generate(task.prompts, Sampling(1000), ADAPTER)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.generate(["a", ""], task.sampling, ADAPTER)
    with pytest.raises(ValueError, match="made for another base model"):
        engine.generate(task.prompts, task.sampling, tmp_path / "other")
    assert engine.generate(task.prompts, task.sampling, ADAPTER) == before
    assert engine.generate([], task.sampling, ADAPTER) == []


def test_an_ls_lora_is_served_neither_by_the_engine_nor_by_vllm_itself(tmp_path: Path) -> None:
    from lslora_tools import TARGETS, splined
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    splined().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"describes an LS-LoRA.*eval --engine transformers"):
        open_engine(str(embedded.base_model_dir()), ModelOptions(), EngineOptions(engine="vllm"), [tmp_path])
    helper = PEFTHelper.from_local_dir(str(tmp_path), 64)
    with pytest.raises(ValueError, match=r"lora_spline_\w+ is unsupported LoRA weight"):
        LoRAModel.from_local_checkpoint(str(tmp_path), set(TARGETS), helper, device="cpu")


def test_a_device_that_this_vllm_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--device cuda:1: the installed vLLM runs on cpu"):
        open_engine(str(embedded.base_model_dir()), ModelOptions(device="cuda:1"), EngineOptions(engine="vllm"))


def test_eval_takes_vllm_where_it_is_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--base_model", str(embedded.base_model_dir()), "--lora_dir", str(ADAPTER)]
    task = ["--eval_data", str(embedded.heldout_file()), "--fewshot", "0", "--max_samples", "8"]
    how = ["--max_tokens", "110", "--enforce_eager", "--out_dir", str(tmp_path), "--json"]
    assert main(["eval", *model, *task, *how]) == 0
    assert '"engine": "vllm"' in capsys.readouterr().out
    config = json.loads((tmp_path / "eval_config.json").read_text())
    assert config["engine"] == "vllm"
    assert config["engine_settings"]["max_lora_rank"] == 32
    assert config["engine_settings"]["max_loras"] == 1
    assert config["total_samples"] == 8

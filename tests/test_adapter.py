"""Adapters as PEFT writes and reads them: factors, scalings, what is edited and what is carried."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import everything, files, handmade, logits, randomise, save
from safetensors.torch import load_file
from tiny_models import tiny_llama, with_lora

from spectral_fast.adapter import Adapter
from spectral_fast.adapter.naming import rank_and_scaling


def live_scalings(model: Any, adapter: str = "default") -> dict[str, float]:
    return {
        name: module.scaling[adapter]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and adapter in module.scaling
    }


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=24, n_layer=2, n_head=2))


TARGETS = ["q_proj", "o_proj", "down_proj"]


LLAMA: dict[str, dict[str, Any]] = {
    "plain": {},
    "suffix patterns": {
        "rank_pattern": {"down_proj": 3, "self_attn.o_proj": 5},
        "alpha_pattern": {"o_proj": 7, "down_proj": 2.5},
    },
    "two patterns match": {
        "rank_pattern": {"model.layers.1.self_attn.o_proj": 2, "o_proj": 4},
        "alpha_pattern": {"o_proj": 4, "model.layers.1.self_attn.o_proj": 2},
    },
    "regular expressions": {
        "rank_pattern": {r"layers\.[02]\..*_proj": 4, r"model\.layers\.1\.mlp\.(up|down)_proj": 2},
        "alpha_pattern": {".*": 3},
    },
    "anchors": {
        "rank_pattern": {"^model.layers.2.self_attn.q_proj": 2, "^o_proj": 1, "^layers.0.mlp.down_proj": 1},
        "alpha_pattern": {"^model.layers.0.*": 5},
    },
    "a part of a component does not match": {"rank_pattern": {"proj": 2, "wn_proj": 3}},
    "rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"q_proj": 9}},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "bias": {"bias": "lora_only", "lora_bias": True},
    "trainable tokens": {"trainable_token_indices": [1, 3]},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"], "rank_pattern": {"embed_tokens": 3}},
}


def base() -> Any:
    return tiny_llama(attention_bias=True, mlp_bias=True)


@pytest.fixture(params=LLAMA, scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A case, the folder that PEFT saved, and the model that PEFT makes of it.

    Not the model that was saved: PEFT sorts the patterns when it saves, and if two match, the first wins.
    """
    from peft import PeftModel

    case = request.param
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")
        original = randomise(with_lora(base(), **{"target_modules": TARGETS, **LLAMA[case]}))
        path = save(original, tmp_path_factory.mktemp("saved") / "adapter")
        model = PeftModel.from_pretrained(base(), str(path))
    assert (live_scalings(original) == live_scalings(model)) == (case != "two patterns match")
    return case, model, path


def test_scalings_and_factors_are_those_of_the_live_model(saved: tuple[str, Any, Path]) -> None:
    case, model, path = saved
    adapter = Adapter.open(path, include_embedding=True)
    assert {name: module.scaling for name, module in adapter.modules.items()} == live_scalings(model)
    assert len(adapter.modules) == 9 + (case == "embedding")
    for name, module in adapter.modules.items():
        layer = model.get_submodule(name)
        if "embed" in name:
            live_b, live_a = layer.lora_embedding_B["default"], layer.lora_embedding_A["default"]
        else:
            live_b, live_a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        b, a = adapter.read(module)
        assert torch.equal(b, live_b)
        assert torch.equal(a, live_a)
        assert (b.shape, a.shape, b.dtype) == ((module.m, module.r), (module.r, module.n), module.dtype)
        assert module.r == layer.r["default"]


def test_unchanged_factors_give_byte_identical_files(saved: tuple[str, Any, Path], tmp_path: Path) -> None:
    _, _, path = saved
    adapter = Adapter.open(path, include_embedding=True)
    before = files(path)
    adapter.write(tmp_path / "out", everything(adapter))
    assert files(tmp_path / "out") == before == files(path)


@pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module")
def test_peft_loads_what_was_written(saved: tuple[str, Any, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    _, model, path = saved
    adapter = Adapter.open(path)
    adapter.write(tmp_path / "same", everything(adapter))
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(tmp_path / "same"))), logits(model))


@pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module")
def test_edited_factors_arrive_in_the_model_and_only_they(saved: tuple[str, Any, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    _, _, path = saved
    adapter = Adapter.open(path)
    chosen = adapter.select(["o_proj"], layer_min=1)
    edited = {module.name: (2 * b, -a) for module in chosen for b, a in [adapter.read(module)]}
    assert len(edited) == 2
    out = tmp_path / "out"
    adapter.write(out, ((module, *edited[module.name]) for module in reversed(chosen)))
    before, after = load_file(adapter.weights.path), load_file(out / adapter.weights.path.name)
    assert list(before) == list(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for module in chosen for key in (module.a_key, module.b_key)}

    model = PeftModel.from_pretrained(base(), str(out))
    for name, (b, a) in edited.items():
        assert torch.equal(model.get_submodule(name).lora_B["default"].weight, b)
        assert torch.equal(model.get_submodule(name).lora_A["default"].weight, a)


EXPECTED_CARRIED = {
    "dora": {"q_proj.lora_magnitude_vector": "DoRA"},
    "modules_to_save": {"lm_head.weight": "modules_to_save", "model.norm.weight": "modules_to_save"},
    "bias": {"o_proj.lora_B.bias": "lora_bias", "o_proj.base_layer.bias": "bias"},
    "trainable tokens": {"token_adapter.trainable_tokens_delta": "embedding"},
    "embedding": {"model.embed_tokens": "not probed", "embed_tokens.base_layer.weight": "embedding"},
}


def test_what_cannot_be_edited_is_carried_with_the_reason(saved: tuple[str, Any, Path]) -> None:
    case, _, path = saved
    adapter = Adapter.open(path)
    expected = EXPECTED_CARRIED.get(case, {})
    assert bool(expected) == bool(adapter.carried)
    for end, reason in expected.items():
        assert any(key.endswith(end) and reason in why for key, why in adapter.carried.items())
    keys = {key for module in adapter.modules.values() for key in (module.a_key, module.b_key)}
    assert not keys & set(adapter.carried)
    scalings = {module.scaling for module in adapter.modules.values()}
    assert [warning.partition(" ")[0] for warning in adapter.warnings] == (
        ["DoRA:"] * (case == "dora") + ["modules"] * (len(scalings) > 1)
    )


def test_conv1d_is_stored_like_a_linear_layer(tmp_path: Path) -> None:
    model = randomise(with_lora(gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    adapter = Adapter.open(save(model, tmp_path / "gpt2"))
    assert {name: module.scaling for name, module in adapter.modules.items()} == live_scalings(model)
    [c_attn, _] = adapter.select(["c_attn"])
    assert (c_attn.m, c_attn.n, c_attn.r) == (72, 24, 6)
    delta = model.get_submodule(c_attn.name).get_delta_weight("default")
    b, a = adapter.read(c_attn)
    assert torch.equal(delta, (b @ a).T * c_attn.scaling)


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = torch.nn.Conv2d(3, 8, (3, 5))
        self.one = torch.nn.Conv1d(8, 4, 3)
        self.grouped = torch.nn.Conv2d(4, 8, 3, groups=2)
        self.linear = torch.nn.Linear(5, 7)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolutions_are_edited_when_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_lora(Convolutions(), r=4, target_modules=["two", "one", "grouped", "linear"])
    path = save(randomise(model), tmp_path / "conv")
    default = Adapter.open(path)
    assert [module.name for module in default.modules.values()] == ["base_model.model.linear"]
    assert sum("include_conv" in reason for reason in default.carried.values()) == 2

    adapter = Adapter.open(path, include_conv=True)
    assert "grouped" in adapter.carried["base_model.model.grouped"]
    assert set(adapter.modules) == {f"base_model.model.{name}" for name in ("one", "two", "linear")}
    two = adapter.modules["base_model.model.two"]
    assert (two.m, two.n, two.r) == (8, 3 * 3 * 5, 4)
    b, a = adapter.read(two)
    delta = model.get_submodule(two.name).get_delta_weight("default")
    # One sum of r products per entry, each rounded: |error| <= 2 r eps sum |b||a|.
    bound = 2 * two.r * torch.finfo(torch.float32).eps * (b.abs() @ a.abs()).max() * two.scaling
    assert (delta.flatten(1) - two.scaling * b @ a).abs().max() <= bound

    adapter.write(tmp_path / "out", [(two, b, a)])
    assert files(tmp_path / "out") == files(path)


def test_a_tied_head_is_carried_as_peft_shares_its_factors(tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    model = with_lora(base, target_modules=["embed_tokens", "o_proj"], ensure_weight_tying=True)
    adapter = Adapter.open(save(model, tmp_path / "tied"), include_embedding=True)
    assert {name.rpartition(".")[2] for name in adapter.modules} == {"o_proj"}
    for name in ("lm_head", "model.embed_tokens"):
        assert "tied" in adapter.carried[f"base_model.model.{name}"]


def test_expert_parameters_are_carried_by_name(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = with_lora(MixtralForCausalLM(config), target_modules=["q_proj"], target_parameters=targets)
    path = save(model, tmp_path / "moe")
    adapter = Adapter.open(path)
    assert [name.rpartition(".")[2] for name in adapter.modules] == ["q_proj"]
    experts = {name: reason for name, reason in adapter.carried.items() if "experts" in name}
    assert len(experts) == 2
    assert all("one tensor holds the factors of all experts" in reason for reason in experts.values())
    adapter.write(tmp_path / "out", everything(adapter))
    assert files(tmp_path / "out") == files(path)


def test_a_variant_whose_update_is_not_the_product_is_carried(tmp_path: Path) -> None:
    from peft.tuners.lora.config import KasaConfig

    model = with_lora(tiny_llama(), target_modules=["q_proj"], kasa_config=KasaConfig())
    path = save(model, tmp_path / "kasa")
    adapter = Adapter.open(path)
    assert not adapter.modules
    with pytest.raises(ValueError, match=r"no editable module; 3 carried unedited: part of a LoRA variant; 3 .*B A"):
        adapter.select()


@pytest.mark.parametrize("variant", ["use_qalora", "use_bdlora", "monteclora_config", "arrow_config", "kasa_config"])
def test_a_variant_is_known_by_its_config_too(tmp_path: Path, variant: str) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a", config={variant: {"some": 1}}))
    assert not adapter.modules
    assert all(variant in reason for reason in adapter.carried.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"use_dora": True}, "DoRA"),
        ({"alpha_pattern": {"layers.0.self_attn.o_proj": 32}}, "scaled by 2 to 8"),
    ],
)
def test_what_to_know_before_an_edit_is_in_the_warnings(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    [warning] = Adapter.open(handmade(tmp_path / "a", config=config)).warnings
    assert words in warning


def test_several_live_adapters_have_folders_of_their_own_which_are_carried(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = with_lora(tiny_llama())
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    path = save(randomise(model), tmp_path / "both")
    adapter, other = Adapter.open(path), Adapter.open(path / "other")
    assert {name: module.scaling for name, module in adapter.modules.items()} == live_scalings(model)
    assert {name: module.scaling for name, module in other.modules.items()} == live_scalings(model, "other")
    adapter.write(tmp_path / "out", [])
    assert files(tmp_path / "out") == files(path)


def test_a_pickled_adapter_gives_the_same_factors_and_stays_pickled(tmp_path: Path) -> None:
    from peft import PeftModel

    model = randomise(with_lora(tiny_llama()))
    reference = Adapter.open(save(model, tmp_path / "safe"))
    path = save(model, tmp_path / "bin", safe_serialization=False)
    adapter = Adapter.open(path)
    assert adapter.weights.path.name == "adapter_model.bin"
    assert set(adapter.modules) == set(reference.modules)
    for name, module in adapter.modules.items():
        for ours, theirs in zip(adapter.read(module), reference.read(reference.modules[name]), strict=True):
            assert torch.equal(ours, theirs)
    [first, *_] = adapter.modules.values()
    b, a = adapter.read(first)
    adapter.write(tmp_path / "out", [(first, 3 * b, a)])
    assert sorted(files(tmp_path / "out")) == sorted(files(path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    assert torch.equal(loaded.get_submodule(first.name).lora_B["default"].weight, 3 * b)
    assert list(torch.load(tmp_path / "out" / "adapter_model.bin", weights_only=True)) == list(
        torch.load(adapter.weights.path, weights_only=True)
    )


def test_pattern_keys_match_as_in_the_installed_peft() -> None:
    from peft.utils.other import get_pattern_key

    names = [
        "model.layers.1.self_attn.o_proj",
        "model.layers.11.self_attn.o_proj",
        "o_proj",
        "h.0.attn.c_attn",
        "a+b",
        "model.base_model.model.x",
    ]
    patterns = [
        "o_proj",
        "_proj",
        "^o_proj",
        "^model.layers.1.self_attn.o_proj",
        r"layers\.1\..*",
        "1.self_attn.o_proj",
        "self_attn.(q|o)_proj",
        ".*",
        "o_proj$",
        "a+b",
        "model.x",
        "q_proj|o_proj",
        "",
        "h.0.*",
    ]
    tried = 0
    for name in names:
        for first in patterns:
            for second in patterns:
                pattern = {first: 3, second: 5}
                expected = pattern.get(get_pattern_key(list(pattern), name), 7)
                config = {"r": 7, "lora_alpha": 1, "rank_pattern": pattern}
                assert rank_and_scaling(f"base_model.model.{name}", config) == (expected, 1 / expected)
                tried += 1
    assert tried == len(names) * len(patterns) ** 2

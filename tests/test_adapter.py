"""Adapters against PEFT itself: what PEFT saves is read with PEFT's scalings, what is written PEFT loads."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, with_lora

from spectral_fast.adapter import Adapter, resolve
from spectral_fast.adapter.naming import rank_and_scaling

META = "spectral_edit_meta.json"


def save(model: Any, folder: Path, **options: Any) -> Path:
    """PEFT's own save, without its notes on embeddings and lora_bias (it thinks the bias a broken factor)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", message=".*have invalid shape.*lora_B.bias")
        model.save_pretrained(str(folder), **options)
    return folder


def live_scalings(model: Any, adapter: str = "default") -> dict[str, float]:
    return {
        name: module.scaling[adapter]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and adapter in module.scaling
    }


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2 * 9).reshape(2, 9)).logits


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def randomise(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def everything(adapter: Adapter) -> Any:
    return ((module, *adapter.read(module)) for module in adapter.modules.values())


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


# Rules of names, without PEFT's files.


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


def handmade(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """An adapter in PEFT's format: r = 4, alpha = 8, o_proj and down_proj in layers 0 to 2."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    if tensors is None:
        tensors = {}
        for layer in range(3):
            for name, m, n in (("self_attn.o_proj", 10, 12), ("mlp.down_proj", 10, 14)):
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, n, generator=generator).bfloat16()
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(m, 4, generator=generator).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_adapters_named_in_the_keys_are_not_mixed_up(tmp_path: Path) -> None:
    tensors = {}
    for name in ("default", "other"):
        tensors[f"x.o_proj.lora_A.{name}.weight"] = torch.full((4, 6), len(name))
        tensors[f"x.o_proj.lora_B.{name}.weight"] = torch.full((5, 4), len(name))
    path = handmade(tmp_path / "two", tensors={key: value.float() for key, value in tensors.items()})
    with pytest.raises(ValueError, match="'default', 'other'; got None"):
        Adapter.open(path)
    with pytest.raises(ValueError, match="'default', 'other'; got 'third'"):
        Adapter.open(path, adapter_name="third")
    for name, rest in (("default", "other"), ("other", "default")):
        adapter = Adapter.open(path, adapter_name=name)
        [module] = adapter.modules.values()
        assert (module.name, module.adapter_name) == ("x.o_proj", name)
        b, a = adapter.read(module)
        assert b.unique().item() == a.unique().item() == len(name)
        assert {f"belongs to adapter {rest!r}"} == set(adapter.carried.values())
        adapter.write(tmp_path / f"out-{name}", [(module, 0 * b, 0 * a)])
        written = load_file(tmp_path / f"out-{name}" / "adapter_model.safetensors")
        assert {key for key, value in written.items() if not value.any()} == {module.a_key, module.b_key}

    single = {key: value.float() for key, value in tensors.items() if "default" in key}
    [module] = Adapter.open(handmade(tmp_path / "one", tensors=single)).modules.values()
    assert module.adapter_name == "default"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"x.lora_A.weight": (4, 6)}, "lora_B is missing"),
        ({"x.lora_B.weight": (4, 6)}, "lora_A is missing"),
        ({"x.lora_A.weight": (4,), "x.lora_B.weight": (6, 4)}, "incomplete"),
        ({"x.lora_A.weight": (4, 0), "x.lora_B.weight": (6, 4)}, "incomplete"),
        ({"x.lora_A.weight": (4, 6, 3), "x.lora_B.weight": (6, 4)}, "not the factors of one product"),
        ({"x.lora_A.weight": (4, 6, 3), "x.lora_B.weight": (6, 4, 2)}, "not the factors of one product"),
        ({"x.lora_A.weight": (4, 6), "x.lora_B.weight": (6, 4), "x.lora_C": (4,)}, "has lora_C too"),
    ],
)
def test_an_odd_module_is_carried_with_the_reason(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], reason: str
) -> None:
    path = handmade(tmp_path / "odd", tensors={key: torch.zeros(shape) for key, shape in tensors.items()})
    adapter = Adapter.open(path)
    assert not adapter.modules
    assert reason in adapter.carried["x"]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.int8, torch.int8)])
def test_factors_of_odd_dtypes_are_carried(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tensors = {
        "x.lora_A.weight": torch.zeros(4, 6, dtype=dtypes[0]),
        "x.lora_B.weight": torch.zeros(5, 4, dtype=dtypes[1]),
    }
    adapter = Adapter.open(handmade(tmp_path / "odd", tensors=tensors))
    assert str(dtypes[1]) in adapter.carried["x"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 16}, r"adapter_config\.json says r=16 but .*o_proj\.lora_A\.weight is \(4, 12\)|down_proj"),
        (
            {"rank_pattern": {"o_proj": 2}},
            r"says r=2 but base_model\.model\.model\.layers\.0\.self_attn\.o_proj",
        ),
        ({"r": 0}, "r=0"),
        ({"r": "4"}, "r='4'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"alpha_pattern": {"(": 3}}, r"'\(' in alpha_pattern is no regular expression"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter.open(handmade(tmp_path / "a", config=config))


def test_factors_of_two_ranks_are_refused(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.zeros(4, 6), "x.lora_B.weight": torch.zeros(5, 3)}
    with pytest.raises(ValueError, match=r"says r=4 but x\.lora_B\.weight is \(5, 3\)"):
        Adapter.open(handmade(tmp_path / "a", tensors=tensors))


def test_peft_defaults_fill_an_old_config(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.zeros(8, 6), "x.lora_B.weight": torch.zeros(5, 8)}
    path = handmade(tmp_path / "a", tensors=tensors)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "rank_pattern": null}')
    assert Adapter.open(path).modules["x"].scaling == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "peft_type LORA"),
        ("{}", "got None"),
        ('{"peft_type": "IA3"}', "got 'IA3'; only LoRA can be edited"),
    ],
)
def test_a_config_that_is_not_lora_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = handmade(tmp_path / "a")
    (path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Adapter.open(path)


def test_missing_files_are_named_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        Adapter.open(tmp_path / "nowhere")
    path = handmade(tmp_path / "a")
    (path / "adapter_model.safetensors").rename(path / "model.safetensors")
    with pytest.raises(
        FileNotFoundError,
        match=r"neither adapter_model\.safetensors nor adapter_model\.bin; it contains .*model\.s",
    ):
        Adapter.open(path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json; it contains model\.safetensors"):
        Adapter.open(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="it is empty"):
        Adapter.open(path)


def chosen_names(adapter: Adapter, *args: Any, **options: Any) -> list[str]:
    return [module.name.removeprefix("base_model.model.model.layers.") for module in adapter.select(*args, **options)]


def test_modules_are_selected_by_last_component_and_layer(tmp_path: Path) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    assert len(adapter.select()) == 6
    assert chosen_names(adapter, ["o_proj"], 1, 1) == ["1.self_attn.o_proj"]
    assert chosen_names(adapter, ("o_proj", "down_proj"), layer_min=2) == [
        "2.mlp.down_proj",
        "2.self_attn.o_proj",
    ]
    assert chosen_names(adapter, "down_proj", layer_max=0) == ["0.mlp.down_proj"]
    for all_of_them in (["all"], ["all-linear"], "all"):
        assert len(adapter.select(all_of_them, layer_max=1)) == 4
    assert not adapter.warnings
    assert len(adapter.select(["o_proj", "q_proj"])) == 3
    assert adapter.warnings == ["target_modules: the adapter has no q_proj; it has down_proj, o_proj"]
    for targets, layers in (
        (["proj"], (0, 9)),
        (["self_attn.o_proj"], (0, 9)),
        (["o_proj"], (3, 9)),
        (["o_proj"], (1, 0)),
    ):
        with pytest.raises(ValueError, match=r"layers \d to \d; the adapter has down_proj \(3\), o_proj \(3\)$"):
            adapter.select(targets, *layers)


def test_modules_without_a_layer_are_in_every_range(tmp_path: Path) -> None:
    tensors = {}
    for prefix in ("h.7.o_proj", "o_proj", "layers.7.o_proj", "m.layers.7.o_proj"):
        tensors |= {
            f"{prefix}.lora_A.weight": torch.zeros(4, 6),
            f"{prefix}.lora_B.weight": torch.zeros(5, 4),
        }
    adapter = Adapter.open(handmade(tmp_path / "a", tensors=tensors))
    assert {module.name for module in adapter.select(layer_max=3)} == set(adapter.modules) - {"m.layers.7.o_proj"}


# Writing.


def test_all_that_lies_in_the_folder_is_carried_with_its_mode(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a")
    (path / "README.md").write_text("# words")
    (path / "checkpoint-1" / "deep").mkdir(parents=True)
    (path / "checkpoint-1" / "deep" / "state.json").write_bytes(b"\x00\xff")
    (path / "run.sh").write_text("true")
    (path / "run.sh").chmod(0o750)
    (path / "adapter_model.safetensors").chmod(0o440)
    for skipped in (".git", ".cache"):
        (path / skipped).mkdir()
        (path / skipped / "x").touch()
    (path / ".gitattributes").touch()
    expected = {name: content for name, content in files(path).items() if not name.startswith((".git/", ".cache/"))}
    adapter = Adapter.open(path)
    adapter.write(tmp_path / "out", everything(adapter))
    assert files(tmp_path / "out") == expected
    for name in expected:
        assert (tmp_path / "out" / name).stat().st_mode == (path / name).stat().st_mode


def test_links_of_a_cached_snapshot_become_files(tmp_path: Path) -> None:
    blobs = handmade(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    (snapshot / "linked").symlink_to(tmp_path / "folder")
    adapter = Adapter.open(snapshot)
    adapter.write(tmp_path / "out", everything(adapter))
    shutil.rmtree(blobs)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert Adapter.open(tmp_path / "out").modules == adapter.modules
    assert (tmp_path / "out" / "linked" / "x").read_text() == "x"


@pytest.mark.parametrize("target", ["..", "nowhere"])
def test_a_link_that_cannot_be_copied_is_named(tmp_path: Path, target: str) -> None:
    path = handmade(tmp_path / "a")
    (path / "sub").mkdir()
    (path / "sub" / "odd").symlink_to(target)
    with pytest.raises(ValueError, match=r"sub/odd is a"):
        Adapter.open(path).write(tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_extra_files_are_made_after_the_edit_and_replace_stale_ones(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a")
    (path / META).write_text("stale, and longer than the new one")
    adapter = Adapter.open(path)
    done: list[str] = []

    def edited() -> Any:
        for module, b, a in everything(adapter):
            yield module, b, a
            done.append(module.name)

    extra = {META: lambda: json.dumps(done).encode(), "note": b"n"}
    adapter.write(tmp_path / "out", edited(), extra)
    assert json.loads((tmp_path / "out" / META).read_text()) == list(adapter.modules)
    assert (tmp_path / "out" / "note").read_bytes() == b"n"
    assert (path / META).read_text().startswith("stale")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "../x", "sub/x", "/x", ".."])
def test_an_extra_file_must_be_a_plain_name_beside_the_weights(tmp_path: Path, name: str) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    with pytest.raises(ValueError, match="extra_files"):
        adapter.write(tmp_path / "out", [], {name: b""})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("overwrite", [False, True])
def test_values_that_are_not_finite_are_refused_and_nothing_is_written(
    tmp_path: Path, value: float, side: int, overwrite: bool
) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    out = handmade(tmp_path / "out") if overwrite else tmp_path / "out"
    before = files(tmp_path)
    edited = list(everything(adapter))
    module = edited[3][0]
    edited[3][1 + side][2, 3] = value
    key = (module.b_key, module.a_key)[side]
    with pytest.raises(ValueError, match=f"the edited {key} has NaN or infinite values"):
        adapter.write(out, edited, overwrite=overwrite)
    assert files(tmp_path) == before


def test_8_bit_floats_are_checked_and_written_too(tmp_path: Path) -> None:
    dtype = torch.float8_e5m2
    tensors = {"x.lora_A.weight": torch.ones(4, 6).to(dtype), "x.lora_B.weight": torch.ones(5, 4).to(dtype)}
    adapter = Adapter.open(handmade(tmp_path / "a", tensors=tensors))
    module = adapter.modules["x"]
    b, a = adapter.read(module)
    with pytest.raises(ValueError, match="NaN or infinite"):
        adapter.write(tmp_path / "out", [(module, (math.inf * b.float()).to(dtype), a)])
    adapter.write(tmp_path / "out", [(module, (2 * b.float()).to(dtype), a)])
    written = Adapter.open(tmp_path / "out")
    assert (written.read(module)[0].float() == 2).all()


def test_factors_of_another_shape_dtype_or_module_are_refused(tmp_path: Path) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    other = Adapter.open(handmade(tmp_path / "b", config={"lora_alpha": 9}))
    [module, *_] = adapter.modules.values()
    b, a = adapter.read(module)
    for edited, message in (
        ([(module, b[:-1], a)], r"lora_B\.weight needs an edited factor of shape \(10, 4\), got \(9, 4\)"),
        ([(module, b, a.T)], r"lora_A\.weight needs an edited factor of shape"),
        ([(module, b.float(), a)], r"lora_B\.weight is to be torch\.bfloat16 .*got torch\.float32"),
        ([(module, b, a)] * 2, "was given twice"),
        ([(other.modules[module.name], b, a)], "is not an editable module of"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.write(tmp_path / "out", edited)
        assert not (tmp_path / "out").exists()


def test_overwrite_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    adapter = Adapter.open(handmade(tmp_path / "a"))
    out = handmade(tmp_path / "out", config={"note": "old"})
    with pytest.raises(FileExistsError, match="--overwrite"):
        adapter.write(out, [])
    with pytest.raises(FileExistsError, match="--overwrite"):
        adapter.check_out_dir(out)
    adapter.check_out_dir(out, overwrite=True)
    adapter.write(out, [], overwrite=True)
    assert files(out) == files(tmp_path / "a")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    for act in (adapter.check_out_dir, lambda out_dir, overwrite: adapter.write(out_dir, [], overwrite=overwrite)):
        with pytest.raises(FileExistsError, match=r"it has no adapter_config\.json"):
            act(tmp_path / "precious", overwrite=True)
        for inside in (tmp_path, tmp_path / "a", tmp_path / "a" / "edited"):
            with pytest.raises(ValueError, match="must not contain each other"):
                act(inside, overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_the_fingerprint_follows_the_weights_and_the_config_only(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a")
    adapter = Adapter.open(path)
    assert set(adapter.hashes) == {"adapter_config.json", "adapter_model.safetensors"}
    adapter.write(tmp_path / "same", everything(adapter), {"README.md": b"other words"})
    assert Adapter.open(tmp_path / "same").fingerprint() == adapter.fingerprint()
    [module, *_] = adapter.modules.values()
    b, a = adapter.read(module)
    adapter.write(tmp_path / "edited", [(module, -b, a)])
    (tmp_path / "same" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    changed = {Adapter.open(tmp_path / name).fingerprint() for name in ("same", "edited")}
    assert len(changed | {adapter.fingerprint()}) == 3
    assert all(len(digest) == 64 for digest in changed)


# Finding an adapter.


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    assert resolve("~/a") == tmp_path / "a"


def test_a_name_is_looked_up_at_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(repo_id: str, cache_dir: Any) -> str:
        return str(Path(cache_dir) / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/adapter", cache_dir=tmp_path) == tmp_path / "someone" / "adapter"


@pytest.mark.parametrize("name", ["someone/adapter", "./no/such/folder", "/no/such/folder"])
def test_a_name_that_is_neither_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="nor a Hugging Face repository that can be downloaded") as caught:
        resolve(name, cache_dir=tmp_path)
    assert str(caught.value).startswith(f"{name!r} is neither a local folder ({Path(name).absolute()} does")
    assert caught.value.__cause__ is not None


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors is a file; give the folder"):
        resolve(tmp_path / "x.safetensors")


# Cost.

# A sparse file stands for the source: 32 modules of 4.7 MB, and a head of 262 MB that is only carried.
MEMORY = """
import json, os, re, sys
from pathlib import Path
import torch
from spectral_fast.adapter import Adapter
from spectral_fast.tensorfile import Layout, TensorInfo

source, out = Path(sys.argv[1], "source"), Path(sys.argv[1], "out")
source.mkdir()
m, n, r = 28672, 8192, 64
infos = {"base_model.model.lm_head.weight": TensorInfo(torch.bfloat16, (32000, 4096))}
for layer in range(32):
    prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj"
    infos[f"{prefix}.lora_A.weight"] = TensorInfo(torch.bfloat16, (r, n))
    infos[f"{prefix}.lora_B.weight"] = TensorInfo(torch.bfloat16, (m, r))
layout = Layout.of(infos)
weights = source / "adapter_model.safetensors"
weights.write_bytes(layout.header)
os.truncate(weights, layout.size)
(source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": r}))

adapter = Adapter.open(source)
modules = adapter.select()
def resident(peak):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(("VmHWM" if peak else "VmRSS") + r":\\s+(\\d+) kB", status)[1])

before = resident(peak=False)
adapter.write(out, ((module, b + 1, a - 1) for module in modules for b, a in [adapter.read(module)]))
growth = resident(peak=True) - before  # ru_maxrss would be the peak of the parent too
written = Adapter.open(out)
b, a = written.read(modules[-1])
assert (b == 1).all() and (a == -1).all()
print(len(modules), growth, (m + n) * r * 2, weights.stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_writing_a_large_adapter_takes_the_memory_of_a_few_modules(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    shutil.rmtree(tmp_path)
    assert result.returncode == 0, result.stderr
    modules, growth, largest, size = map(int, result.stdout.split())
    assert modules == 32
    assert size > 400e6
    assert growth < 10 * largest


def test_importing_the_package_imports_no_model_library() -> None:
    heavy = {"transformers", "peft", "huggingface_hub"}
    script = f"import sys, spectral_fast.adapter; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"

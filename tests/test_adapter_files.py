"""Configs and weight files as they occur in the wild: several adapters, odd modules, contradictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import handmade
from safetensors.torch import load_file

from spectral_fast.adapter import Adapter


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
        ('{"peft_type": "LORA", "rank_pattern": [1]}', r"rank_pattern must map names of modules to numbers; got \[1\]"),
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

"""Adapters made from nothing: what PEFT and `Adapter` read of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import handmade
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_llama

from spectral_fast.adapter import Adapter
from spectral_fast.adapter.creation import creating, new_config, plain_module
from spectral_fast.adapter.naming import LoraModule
from spectral_fast.tensorfile import TensorInfo

PREFIX = "base_model.model.model.layers."


def modules_of(ranks: dict[str, int], dtype: torch.dtype = torch.float32) -> list[LoraModule]:
    """Of the tiny Llama."""
    base = dict(tiny_llama().named_modules())
    named = {name: base[f"model.layers.{name}"] for name in ranks}
    return [
        plain_module(PREFIX + name, x.out_features, x.in_features, ranks[name], dtype, scaling=0.5)
        for name, x in named.items()
    ]


def factors(module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(module.r)
    shapes = (module.m, module.r), (module.r, module.n)
    b, a = (torch.randn(shape, generator=generator).to(module.dtype) for shape in shapes)
    return b, a


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 5, 1)], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_what_was_created(tmp_path: Path, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    names = ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj")
    modules = modules_of(dict(zip(names, ranks, strict=True)), dtype)
    made = {module.name: factors(module) for module in modules}
    with creating(tmp_path / "out", new_config(modules), modules, {"note.json": lambda: b"{}"}) as put:
        for name, (b, a) in reversed(made.items()):
            put(name, b, a)
    assert (tmp_path / "out" / "note.json").read_bytes() == b"{}"
    base, model = tiny_llama(), PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")).merge_and_unload()
    before, after = base.state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{name}.weight" for name in names}
    for module in modules:
        name = f"{module.name.removeprefix('base_model.model.')}.weight"
        b, a = made[module.name]
        delta = 0.5 * (b.double() @ a.double())
        torch.testing.assert_close(after[name].double() - before[name].double(), delta, rtol=0, atol=1e-5)
    opened = Adapter.open(tmp_path / "out")
    assert {(module.name, module.r, module.scaling) for module in opened.modules.values()} == {
        (module.name, module.r, 0.5) for module in modules
    }


def test_other_tensors_and_stored_shapes_are_written_too(tmp_path: Path) -> None:
    module = plain_module("base_model.model.conv", 6, 12, 2, torch.float16)
    other = torch.arange(5)
    shapes = {module.b_key: (6, 2, 1, 1), module.a_key: (2, 3, 2, 2)}
    others = {"base_model.model.head.weight": (TensorInfo(other.dtype, (5,)), lambda: other)}
    with creating(tmp_path / "out", new_config([module]), [module], shapes=shapes, others=others) as put:
        put(module.name, *factors(module))
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == {
        **shapes,
        "base_model.model.head.weight": (5,),
    }
    adapter = Adapter.open(tmp_path / "out", include_conv=True)
    b, a = adapter.read(adapter.modules[module.name])
    assert torch.equal(b, factors(module)[0])
    assert torch.equal(a, factors(module)[1])


def test_what_is_already_there_is_replaced_only_when_asked_for_and_never_a_source(tmp_path: Path) -> None:
    [module] = modules = modules_of({"0.mlp.up_proj": 1})
    handmade(tmp_path / "source")
    (tmp_path / "file").write_text("")

    def create(out_dir: Path, **options: Any) -> None:
        with creating(out_dir, new_config(modules), modules, **options) as put:
            put(module.name, *factors(module))

    with pytest.raises(ValueError, match="must not contain each other"):
        create(tmp_path / "source", overwrite=True, sources=[tmp_path / "other", tmp_path / "source"])
    with pytest.raises(FileExistsError, match="not empty"):
        create(tmp_path / "source")
    with pytest.raises(NotADirectoryError):
        create(tmp_path / "file")
    create(tmp_path / "source", overwrite=True)
    assert json.loads((tmp_path / "source" / "adapter_config.json").read_text())["r"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda name, b, a: [("x", b, a)], "x is not a module of the adapter"),  # noqa: ARG005
        (lambda name, b, a: [(name, b[:, :1], a)], "needs an edited factor of shape"),
        (lambda name, b, a: [(name, b * float("nan"), a)], "NaN or infinite"),
        (lambda name, b, a: [(name, b.double(), a)], "float64"),
        (lambda name, b, a: [(name, b, a)] * 2, "given twice"),
        (lambda name, b, a: [], "never given"),  # noqa: ARG005
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(tmp_path: Path, given: Any, message: str) -> None:
    [module] = modules = modules_of({"0.mlp.up_proj": 2})

    def create() -> None:
        with creating(tmp_path / "out", new_config(modules), modules) as put:
            for arguments in given(module.name, *factors(module)):
                put(*arguments)

    with pytest.raises(ValueError, match=message):
        create()
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_modules_and_a_file_in_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one module"):
        new_config([])
    modules = modules_of({"0.mlp.up_proj": 2})
    for name in ("adapter_config.json", "a/b"):
        with (
            pytest.raises(ValueError, match="extra_files"),
            creating(tmp_path / "out", new_config(modules), modules, {name: b""}),
        ):
            pass

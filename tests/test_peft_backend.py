"""PEFT's functions with the compact inside: the same products, and all else left to PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    DeloraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    convert_to_lora,
    get_peft_model,
    save_as_lora,
)
from peft.tuners.lora.intruders import reduce_intruder_dimension  # before anything is enabled, as users do
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectral_fast.integrations import peft_svd
from spectral_fast.integrations.peft import INSIDES, fast_svd

FUNCTIONS = [peft_svd.find(path) for path in INSIDES]
TWO = (["0", "1"], [0.7, -1.3])


@contextmanager
def compact() -> Iterator[list[str]]:
    """The backend is on; gives the names of functions of which a call was left to PEFT."""
    left: list[str] = []
    with fast_svd():
        own = dict(peft_svd.originals)

        def counted(name: str, *args: Any, **others: Any) -> Any:
            left.append(name)
            return own[name](*args, **others)

        peft_svd.originals.update({name: partial(counted, name) for name in own})
        try:
            yield left
        finally:
            peft_svd.originals.update(own)


class Layers(nn.Module):
    """A layer of each kind that LoRA goes on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.embedding = nn.Embedding(50, 24)
        self.linear = nn.Linear(24, 40)
        self.transposed = Conv1D(24, 40)
        self.convolution = nn.Conv2d(6, 8, 3)


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.data = values.to(parameter)
    return model


def model_with(*configs: LoraConfig, base: nn.Module | None = None, **options: Any) -> Any:
    """A model with the adapters "0", "1", ..., all factors random."""
    torch.manual_seed(0)
    model = get_peft_model(base or tiny_llama(), configs[0], adapter_name="0", **options)
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(index), config)
    return randomised(model)


def layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def deltas(model: Any, adapter: str) -> dict[str, Tensor]:
    """Layer -> its dense update."""
    return {
        name: layer.get_delta_weight(adapter).detach()
        for name, layer in layers(model).items()
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= limit * delta.norm(), name


def lora(r: int = 4, **others: Any) -> LoraConfig:
    return LoraConfig(**{"r": r, "target_modules": ["q_proj", "o_proj", "down_proj"], "lora_alpha": 7, **others})


PAIRS = {
    "of one rank": (lora(), lora(lora_alpha=3)),
    "of two ranks": (lora(4), lora(9)),
    "rslora": (lora(4, use_rslora=True), lora(6)),
    "with patterns": (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 1.5}), lora(6)),
    "on other modules": (lora(target_modules=["q_proj", "o_proj"]), lora(target_modules=["q_proj", "up_proj"])),
    "DoRA": (lora(use_dora=True), lora()),
}


@pytest.mark.parametrize("rank", [None, 3, 20])
@pytest.mark.parametrize("configs", PAIRS.values(), ids=PAIRS)
def test_weighted_adapters_are_those_of_peft(configs: tuple[LoraConfig, ...], rank: int | None) -> None:
    model = model_with(*configs)
    with compact() as left:
        model.add_weighted_adapter(*TWO, "compact", svd_rank=rank)
    assert not left
    model.add_weighted_adapter(*TWO, "dense", svd_rank=rank)
    assert_close(deltas(model, "compact"), deltas(model, "dense"))
    for layer in layers(model).values():
        if "compact" in layer.lora_A:  # Vh has orthonormal rows, those beyond the rank of ΔW too
            a = layer.lora_A["compact"].weight
            torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-5)


def test_adapters_that_are_zero_give_zero_as_in_peft() -> None:
    model = model_with(lora(), lora())
    for layer in layers(model).values():
        layer.lora_B["0"].weight.data.zero_()
        layer.lora_B["1"].weight.data.zero_()
    with compact() as left:
        model.add_weighted_adapter(*TWO, "compact")
    assert not left
    assert not any(delta.any() for delta in deltas(model, "compact").values())


def test_embeddings_and_transposed_layers_are_merged_and_convolutions_left_to_peft() -> None:
    config = LoraConfig(r=4, target_modules=["embedding", "linear", "transposed", "convolution"])
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = model_with(config, config, base=Layers())
    with compact() as left:
        model.add_weighted_adapter(*TWO, "compact")
    assert left == ["_svd_generalized_task_arithmetic_weighted_adapter"]
    model.add_weighted_adapter(*TWO, "dense")
    assert_close(deltas(model, "compact"), deltas(model, "dense"))


@pytest.mark.parametrize(
    "options",
    [
        {"combination_type": "ties_svd", "density": 0.5},
        {"combination_type": "magnitude_prune_svd", "density": 0.5},
        {"svd_clamp": 0.99},
    ],
    ids=str,
)
def test_what_is_not_the_same_by_factors_is_left_to_peft_with_all_its_arguments(options: dict[str, Any]) -> None:
    model = model_with(lora(), lora())
    with compact() as left:
        model.add_weighted_adapter(*TWO, "compact", **options)
    assert len(left) == len(layers(model))
    model.add_weighted_adapter(*TWO, "dense", **options)
    assert_close(deltas(model, "compact"), deltas(model, "dense"), limit=0)


def test_a_rank_that_the_layers_do_not_have_is_left_to_peft() -> None:
    model = model_with(lora(), lora())
    with compact() as left:
        model.add_weighted_adapter(*TWO, "merged", svd_rank=60)
    assert len(left) == len(layers(model))


def test_a_layer_of_which_one_adapter_is_of_an_unknown_kind_is_left_to_peft() -> None:
    class Marked(Tensor):
        pass

    model = model_with(lora(), lora())
    for layer in layers(model).values():
        layer.lora_B["1"].weight = nn.Parameter(layer.lora_B["1"].weight.detach().as_subclass(Marked))
    with compact() as left:
        model.add_weighted_adapter(*TWO, "merged")
    assert len(left) == len(layers(model))


def test_factors_with_more_columns_than_a_dense_svd_is_worth_are_left_to_peft() -> None:
    model = model_with(lora(20), lora(20))  # of 48
    with compact() as left:
        model.add_weighted_adapter(*TWO, "compact")
        assert len(left) == len(layers(model))
        reduce_intruder_dimension(model_with(lora(30)), "0", logging_sink=None)
    assert left[-1] == "reduce_intruder_dimension"


def test_full_matrices_make_no_difference_and_drivers_are_peft_s() -> None:
    model = model_with(lora(), lora())
    with compact() as left:
        model.add_weighted_adapter(*TWO, "thin", svd_full_matrices=False)
        assert not left
        with pytest.raises(RuntimeError, match="driver"):  # torch has them on CUDA only
            model.add_weighted_adapter(*TWO, "driven", svd_driver="gesvd")
        assert left
    model.add_weighted_adapter(*TWO, "dense")
    assert_close(deltas(model, "thin"), deltas(model, "dense"))


CONVERTIBLE = {
    "LoRA": lora(5),
    "rslora": lora(5, use_rslora=True),
    "VeRA": VeraConfig(r=7, target_modules=["q_proj", "o_proj"], init_weights=False),
    "DeLoRA": DeloraConfig(r=6, target_modules=["q_proj", "down_proj"], init_weights=False),
    "VB-LoRA": VBLoRAConfig(r=4, target_modules=["q_proj", "down_proj"], vector_length=16, num_vectors=20, topk=2),
    "LoHa": LoHaConfig(r=4, alpha=3, target_modules=["q_proj", "down_proj"], init_weights=False),
    "LoKr": LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"], decompose_factor=4, init_weights=False),
}


@pytest.mark.parametrize("rank", [3, 20, 0.8])
@pytest.mark.parametrize("kind", CONVERTIBLE)
def test_conversions_are_those_of_peft(kind: str, rank: float) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), CONVERTIBLE[kind]).eval()
    if kind in ("LoRA", "rslora"):
        randomised(model)
    with warnings_of_lora(kind):
        expected_config, expected = convert_to_lora(model, rank=rank)
    with compact() as left, warnings_of_lora(kind):
        config, found = convert_to_lora(model, rank=rank)
    assert not left
    assert config == expected_config
    assert found.keys() == expected.keys()
    for key in [key for key in found if "lora_A" in key]:
        (a, b), (a0, b0) = ((x[key], x[key.replace("lora_A", "lora_B")]) for x in (found, expected))
        assert (a.dtype, a.shape, b.shape) == (a0.dtype, a0.shape, b0.shape)
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert (b @ a - b0 @ a0).norm() <= 1e-5 * (b0 @ a0).norm()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-5)


@contextmanager
def warnings_of_lora(kind: str) -> Iterator[None]:
    with ExitStack() as stack:
        if kind in ("LoRA", "rslora"):
            stack.enter_context(pytest.warns(UserWarning, match="already a LoRA adapter"))
        yield


def test_a_transposed_layer_is_converted_as_by_peft() -> None:
    config = LoraConfig(r=4, target_modules=["transposed"], fan_in_fan_out=True)
    model = model_with(config, base=Layers())
    with warnings_of_lora("LoRA"), compact() as left:
        _, found = convert_to_lora(model, rank=3, adapter_name="0")
    assert not left
    with warnings_of_lora("LoRA"):
        _, expected = convert_to_lora(model, rank=3, adapter_name="0")
    (a, b), (a0, b0) = found.values(), expected.values()
    assert (a.shape, b.shape) == (a0.shape, b0.shape)
    torch.testing.assert_close(b @ a, b0 @ a0, rtol=0, atol=1e-5)


def test_an_update_of_high_rank_and_a_rank_that_is_too_large_are_left_to_peft() -> None:
    full = get_peft_model(tiny_llama(), LoKrConfig(r=16, target_modules=["q_proj"], init_weights=False))
    with compact() as left:
        convert_to_lora(full, rank=3)
        assert left == ["_convert_module_to_lora"] * len(layers(full))
        with pytest.raises(ValueError, match="larger than the weight shape"), warnings_of_lora("LoRA"):
            convert_to_lora(model_with(lora()), rank=49, adapter_name="0")


def test_a_negative_rank_gives_what_peft_gives() -> None:
    model = model_with(lora())
    with compact() as left, warnings_of_lora("LoRA"):
        _, found = convert_to_lora(model, rank=-3, adapter_name="0")
    assert len(left) == len(layers(model))
    with warnings_of_lora("LoRA"):
        _, expected = convert_to_lora(model, rank=-3, adapter_name="0")
    assert {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in expected.items()}


@pytest.mark.parametrize("kind", CONVERTIBLE)
def test_half_precision_is_converted_to_pefts_dtypes(kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama().bfloat16(), CONVERTIBLE[kind], autocast_adapter_dtype=False).eval()
    if kind in ("LoRA", "rslora"):
        randomised(model)
    with warnings_of_lora(kind):
        _, expected = convert_to_lora(model, rank=3)
    with compact() as left, warnings_of_lora(kind):
        _, found = convert_to_lora(model, rank=3)
    assert not left
    for key in [key for key in found if "lora_A" in key]:
        (a, b), (a0, b0) = ((x[key], x[key.replace("lora_A", "lora_B")]) for x in (found, expected))
        assert (a.dtype, b.dtype) == (a0.dtype, b0.dtype)
        product, other = b.double() @ a.double(), b0.double() @ a0.double()
        # PEFT rounds ΔW, and each rounds both factors: 2^-9 of every entry, and the cut to 3 of near values besides.
        assert (product - other).norm() <= 8 * 2**-8 * other.norm()


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_what_is_compiled_is_pefts_own() -> None:
    torch._dynamo.reset()
    model = get_peft_model(tiny_llama(), VeraConfig(r=7, target_modules=["q_proj"], init_weights=False)).eval()
    with compact() as left:
        _, found = convert_to_lora(model, rank=3, compile_kwargs={"backend": "eager"})
    assert set(left) == {"_convert_module_to_lora"}
    _, expected = convert_to_lora(model, rank=3)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


def test_a_layer_that_forms_its_update_in_another_way_is_left_to_peft() -> None:
    class Doubled(peft.tuners.lora.layer.Linear):
        def get_delta_weight(self, adapter: str) -> Tensor:
            return 2 * super().get_delta_weight(adapter)

    model = model_with(lora(), lora())
    for layer in layers(model).values():
        layer.__class__ = Doubled
    with compact() as left, warnings_of_lora("LoRA"):
        model.add_weighted_adapter(*TWO, "merged")
        convert_to_lora(model, rank=3, adapter_name="0")
        reduce_intruder_dimension(model, "0", logging_sink=None)
    assert set(left) == {function.__name__ for function in FUNCTIONS}


def test_save_as_lora_writes_what_peft_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), CONVERTIBLE["VeRA"]).eval()
    tokens = torch.arange(18).reshape(2, 9)
    with compact() as left:
        save_as_lora(tmp_path, model, rank=7)
    assert not left
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("epsilon", [0.5, 999.0, 0.0])
def test_intruders_are_reduced_as_by_peft(epsilon: float) -> None:
    base = tiny_llama().double()  # so that W + ΔW - W of PEFT is ΔW
    model = model_with(lora(), base=base).double()
    told: dict[str, list[str]] = {"compact": [], "dense": []}
    options = {"old_adapter_name": "0", "top_k": 4, "threshold_epsilon": epsilon, "mitigation_lambda": 0.6}
    with compact() as left:
        reduce_intruder_dimension(model, new_adapter_name="compact", logging_sink=told["compact"].append, **options)
    assert not left
    assert model.active_adapters == ["compact"]
    reduce_intruder_dimension(model, new_adapter_name="dense", logging_sink=told["dense"].append, **options)
    assert_close(deltas(model.double(), "compact"), deltas(model.double(), "dense"))
    assert [line.replace("compact", "dense") for line in told["compact"]] == told["dense"]


def test_intruders_in_half_precision_and_on_embeddings_or_transposed_layers_are_left_to_peft() -> None:
    half = model_with(lora(), base=tiny_llama().bfloat16(), autocast_adapter_dtype=False)
    embedding = model_with(lora(target_modules=["embed_tokens"]))
    transposed = model_with(lora(target_modules=["transposed"], fan_in_fan_out=True), base=Layers())
    with compact() as left:
        for model in (half, embedding, transposed):
            reduce_intruder_dimension(model, "0", threshold_epsilon=999, logging_sink=None)
    assert left == ["reduce_intruder_dimension"] * 3

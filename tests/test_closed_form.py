"""Sensitivities from the gradients of a training loop, against autograd through σ and against `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapter_tools import logits, save
from tiny_models import tiny_llama, with_lora

from spectral_fast import POLICIES, Adapter, calibrate, edit_adapter, sensitivity_from_gradients
from spectral_fast.calibration.spectral_form import lora_layers
from spectral_fast.sensitivity import Sensitivity

O_PROJ = "base_model.model.model.layers.1.self_attn.o_proj"


def chats(count: int = 6) -> list[dict[str, list[int]]]:
    """Rows of a data set, as for training on every answer of a conversation of two turns."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        ids = torch.randint(0, 97, (9 + 3 * i,), generator=generator).tolist()
        counted = [i % 7 in (3, 4, 5) for i in range(len(ids))]
        labels = [token if counts else -100 for token, counts in zip(ids, counted, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def backward(model: Any, rows: list[dict[str, list[int]]], divide_by: int = 1) -> None:
    """What a step of training does with one micro-batch; transformers' own loss would round to float32."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = pad([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=-100)
    mask = pad([torch.ones(len(row["labels"])) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    (F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()) / divide_by).backward()


def through_sigma(model: Any, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Autograd's own g: the branch of every layer as the dense matrix U diag(σ) Vᵀ."""
    sigmas = {}
    for name, layer in lora_layers(model, "default").items():
        b, a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
        r = b.shape[1]
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        u, vh = u[:, :r], vh[:r]
        sigmas[name] = sigma = s[:r].clone().requires_grad_(True)

        def forward(x: Any, layer: Any = layer, u: Any = u, sigma: Any = sigma, vh: Any = vh) -> Any:
            return layer.base_layer(x) + layer.scaling["default"] * F.linear(x, u @ torch.diag(sigma) @ vh)

        layer.forward = forward
    for first in range(0, len(rows), 2):
        backward(model, rows[first : first + 2])
    return {name: sigma.grad for name, sigma in sigmas.items()}


def difference(got: Sensitivity, wanted: dict[str, torch.Tensor], scale: float = 1.0) -> float:
    assert set(got.modules) == set(wanted)
    return max(float((scale * got.modules[name].g - g).norm() / g.norm()) for name, g in wanted.items())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"o_proj": 3, "down_proj": 11}},
        {"target_modules": "all-linear", "lora_dropout": 0.0},
    ],
)
def test_it_is_the_gradient_that_autograd_finds_through_sigma(config: dict[str, Any]) -> None:
    model = with_lora(tiny_llama().double(), **config).double()
    rows = chats()
    for first in (0, 2, 4):
        backward(model, rows[first : first + 2])
    got = sensitivity_from_gradients(model)
    assert difference(got, through_sigma(model, rows)) <= 1e-10


def test_it_is_what_calibrate_measures_on_the_same_rows() -> None:
    for config in ({}, {"use_dora": True}):
        model = with_lora(tiny_llama().double(), **config).double()
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data *= 1.0 + 0.3 * torch.rand_like(parameter)
        rows = chats()
        for first in (0, 2, 4):
            backward(model, rows[first : first + 2])
        measured = calibrate(model, "default", rows, batch_size=2)
        wanted = {name: module.g for name, module in measured.modules.items()}
        assert difference(sensitivity_from_gradients(model), wanted) <= 1e-10


def test_a_training_loop_with_accumulation_has_it_at_every_step() -> None:
    model = with_lora(tiny_llama().double()).double().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = chats(8)
    for _ in range(3):
        for first in (0, 2, 4, 6):  # four: transformers' norms round to float32, which a power of two does not change
            backward(model, rows[first : first + 2], divide_by=4)
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        got = sensitivity_from_gradients(model)
        wanted = calibrate(model, "default", rows, batch_size=2)
        assert difference(got, {name: module.g for name, module in wanted.modules.items()}, 4.0) <= 1e-10
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_carries_an_adapter_from_its_files_for_one_call(tmp_path: Path) -> None:
    from peft import PeftModel

    with_lora(tiny_llama()).save_pretrained(tmp_path / "adapter")
    adapter = Adapter.open(tmp_path / "adapter")
    wanted = calibrate(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter"), "default", chats())
    model = tiny_llama().train()
    before = {name: id(module) for name, module in model.named_modules()}
    for _ in range(2):
        got = calibrate(model, adapter, chats())
        assert {name: id(module) for name, module in model.named_modules()} == before
        assert all(p.requires_grad for p in model.parameters())
        assert all(module.training for module in model.modules())
        assert not hasattr(model, "peft_config")
        assert difference(got, {name: module.g for name, module in wanted.modules.items()}) <= 1e-6
    assert got.record["adapter_sha256"] == adapter.fingerprint()
    edit_adapter(adapter, POLICIES["abs_select"](), tmp_path / "edited", sensitivity=got)
    with pytest.raises(ValueError, match="carries adapters already"):
        calibrate(with_lora(model), adapter, chats())
    other = tiny_llama(hidden_size=64)
    with pytest.raises(ValueError, match="was made for another base model"):
        calibrate(other, adapter, chats())


def state(model: Any) -> tuple[dict[str, Any], ...]:
    """All of a model that an adapter may change, tensors by their bits, modules and parameters as objects."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        {name: (id(m), m.training, tuple(m._forward_hooks)) for name, m in model.named_modules(remove_duplicate=False)},
        {"attributes": sorted(vars(model)), "config": model.config.to_dict()},
    )


def assert_unchanged(model: Any, before: tuple[dict[str, Any], ...]) -> None:
    tensors, *rest = state(model)
    assert rest == list(before[1:])
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


def biased_llama(**config: Any) -> Any:
    """A model of which every kind of tensor may be saved by an adapter; half of it is frozen."""
    model = tiny_llama(attention_bias=True, mlp_bias=True, **config).train()
    model.model.layers[0].eval().requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"modules_to_save": ["lm_head"]}, False),
        ({"bias": "all"}, True),
        ({"bias": "lora_only"}, False),
        ({"trainable_token_indices": [1, 2]}, True),
        ({"use_dora": True}, False),
    ],
)
def test_an_adapter_with_more_than_factors_leaves_the_model_as_it_was(
    tmp_path: Path, config: dict[str, Any], tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all goes well, calibration fails, or PEFT fails after it has put its layers into the model."""
    from peft import PeftModel

    source = with_lora(biased_llama(tie_word_embeddings=tied), **config)
    with torch.no_grad():
        for p in source.parameters():
            if p.requires_grad:
                p.add_(0.1)
    adapter = Adapter.open(save(source, tmp_path / "adapter"))
    model = biased_llama(tie_word_embeddings=tied)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    before = state(model)
    got = calibrate(model, adapter, chats())
    assert_unchanged(model, before)
    wanted = calibrate(source, "default", chats())
    assert difference(got, {name: module.g for name, module in wanted.modules.items()}) <= 1e-6
    with pytest.raises(ValueError, match="is not a linear LoRA layer"):
        calibrate(model, adapter, chats(), modules=["lm_head"])
    assert_unchanged(model, before)
    monkeypatch.setattr(PeftModel, "load_adapter", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk")))
    with pytest.raises(OSError, match="the disk"):
        calibrate(model, adapter, chats())
    assert_unchanged(model, before)
    seen.clear()
    handle.remove()
    logits(model)
    assert not seen  # the handle still knew its hook


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrappers", [["ddp"], ["compile"], ["compile", "ddp"], ["ddp", "compile"]])
def test_a_compiled_or_distributed_model_is_measured_like_the_bare_one(wrappers: list[str]) -> None:
    model = with_lora(tiny_llama().double()).double()
    backward(model, chats(2))
    wanted = sensitivity_from_gradients(model), calibrate(model, "default", chats())
    for wrapper in wrappers:
        model = torch.compile(model) if wrapper == "compile" else torch.nn.parallel.DistributedDataParallel(model)
    got = sensitivity_from_gradients(model), calibrate(model, "default", chats())
    for one, same in zip(got, wanted, strict=True):
        assert difference(one, {name: module.g for name, module in same.modules.items()}) == 0.0


def test_a_compiled_base_model_carries_an_adapter_too(tmp_path: Path) -> None:
    adapter = Adapter.open(save(with_lora(tiny_llama()), tmp_path / "adapter"))
    model = tiny_llama()
    wanted = calibrate(model, adapter, chats())
    got = calibrate(torch.compile(model), adapter, chats())
    assert difference(got, {name: module.g for name, module in wanted.modules.items()}) == 0.0


def test_a_model_that_looks_at_the_weights_of_its_linear_layers_can_be_measured() -> None:
    """As Jamba and RWKV do, for dtypes and devices."""
    model = with_lora(tiny_llama(attention_bias=True))
    wanted = calibrate(model, "default", chats())
    attention = model.get_base_model().model.layers[1].self_attn
    looked = []

    def look(module: Any, _: Any) -> None:
        looked.append((type(module.o_proj).__name__, id(module.o_proj.weight), id(module.o_proj.bias)))

    base = attention.o_proj.base_layer
    attention.register_forward_pre_hook(look)
    got = calibrate(model, "default", chats())
    assert set(looked) == {("SpectralLinear", id(base.weight), id(base.bias))}
    assert difference(got, {name: module.g for name, module in wanted.modules.items()}) == 0.0


def test_factors_in_single_precision_are_measured_to_single_precision() -> None:
    model = with_lora(tiny_llama())
    rows = chats()
    backward(model, rows[:2])
    got = sensitivity_from_gradients(model)
    assert difference(got, through_sigma(model.double(), rows[:2])) <= 1e-5


def test_before_the_first_step_of_training_all_is_zero() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["o_proj"]))
    backward(model, chats(2))
    for module in sensitivity_from_gradients(model).modules.values():
        assert module.s.tolist() == module.g.tolist() == [0.0] * 4


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_without_full_rank_leaves_the_other_directions_as_they_are(factor: str, dtype: torch.dtype) -> None:
    model = with_lora(tiny_llama().to(dtype), target_modules=["o_proj"]).to(dtype)
    for layer in lora_layers(model, "default").values():
        weight = getattr(layer, factor)["default"].weight.data
        weight = weight if factor == "lora_A" else weight.mT
        weight[4] = weight[1]
        weight[5] = 0
    rows = chats(2)
    backward(model, rows)
    got = sensitivity_from_gradients(model)
    wanted = through_sigma(model.double(), rows)
    assert difference(got, {name: F.pad(g[:4], (0, 2)) for name, g in wanted.items()}) <= (
        1e-10 if dtype == torch.float64 else 1e-5
    )


def test_more_ranks_than_features_are_zero() -> None:
    model = with_lora(tiny_llama().double(), target_modules=["k_proj"], r=30).double()  # k_proj is 24 x 48
    rows = chats(2)
    backward(model, rows)
    got = sensitivity_from_gradients(model)
    wanted = through_sigma(model, rows)
    assert difference(got, {name: F.pad(g[:24], (0, 6)) for name, g in wanted.items()}) <= 1e-10


def test_only_the_gradient_of_b_is_needed() -> None:
    model = with_lora(tiny_llama().double(), target_modules=["o_proj"]).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    rows = chats(2)
    backward(model, rows)
    got = sensitivity_from_gradients(model, modules=[O_PROJ])
    assert difference(got, {O_PROJ: through_sigma(model, rows)[O_PROJ]}) <= 1e-10


def spoil(model: Any) -> None:
    model.get_submodule(O_PROJ).lora_B["default"].weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda m: m.zero_grad(), r"layers\.0\..*q_proj: lora_B of adapter 'default' has no \.grad"),
        (lambda m: m.merge_adapter(), "q_proj: adapter 'default' is merged into the base weights"),
        (spoil, r"layers\.1\.self_attn\.o_proj: the gradient of B is NaN or infinite"),
    ],
)
def test_what_has_no_gradient_is_refused_by_its_name(prepare: Any, message: str) -> None:
    model = with_lora(tiny_llama())
    backward(model, chats(2))
    prepare(model)
    with pytest.raises(ValueError, match=message):
        sensitivity_from_gradients(model)


@pytest.mark.parametrize("measure", [sensitivity_from_gradients, lambda m, *a, **k: calibrate(m, *a, chats(2), **k)])
def test_names_that_are_not_there_are_refused(measure: Any) -> None:
    model = with_lora(tiny_llama())
    with pytest.raises(ValueError, match=r"^lm_head is not a linear LoRA layer of adapter 'default'.*\.q_proj is$"):
        measure(model, "default", modules=["lm_head"])
    with pytest.raises(ValueError, match="modules must name at least one LoRA layer, got none"):
        measure(model, "default", modules=[])
    with pytest.raises(ValueError, match=r"no linear LoRA layer of adapter 'mine'; it has 'default'$"):
        measure(model, "mine")
    with pytest.raises(ValueError, match=r"no linear LoRA layer of adapter 'mine'; pass the PEFT model itself$"):
        measure(tiny_llama(), "mine")

"""g of the spectral form against three independent formulas, in every setting that PEFT allows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_batches import calibration_loss, nominal_batches
from tiny_models import randomise_b, tiny_llama, with_lora

from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.data import Example
from spectral_fast.calibration.spectral_form import lora_layers, spectral_form


def ragged_examples(count: int = 7, seed: int = 3) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 30, (), generator=generator))
        prompt = int(torch.randint(1, length, (), generator=generator))
        ids = torch.randint(0, 97, (length,), generator=generator).tolist()
        examples.append(Example.continuation(ids, prompt))
    return examples


def model_loss(model: Any, batch: Any) -> torch.Tensor:
    """Mean over the batch's labelled tokens from full logits, in the model's own precision."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)


def directions(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, a = layer.lora_B[adapter].weight.detach().double(), layer.lora_A[adapter].weight.detach().double()
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    r = b.shape[1]
    return u[:, :r], s[:r], vh[:r]


def by_hooks(model: Any, adapter: str, examples: list[Example], batch_size: int) -> dict[str, torch.Tensor]:
    """The published method: cache x in a forward hook, project x and dy in a backward hook, token by token."""
    found: dict[str, torch.Tensor] = {}
    handles, cache = [], {}
    mask: list[torch.Tensor] = []
    for name, layer in lora_layers(model, adapter).items():
        u, _, vh = directions(layer, adapter)

        def keep(_: Any, args: Any, __: Any, name: str = name) -> None:
            cache[name] = args[0].detach() * mask[0][..., None]

        def add(module: Any, _: Any, grad_out: Any, name: str = name, u: Any = u, vh: Any = vh) -> None:
            q, p = grad_out[0] @ u, cache[name] @ vh.mT
            total = module.scaling[adapter] * (q * p).sum((0, 1))
            found[name] = found.get(name, 0) + total

        handles += [layer.register_forward_hook(keep), layer.register_full_backward_hook(add)]
    for batch in nominal_batches(examples, batch_size):
        mask[:] = [batch.attention_mask]
        model_loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    return found


def by_autograd(model: Any, adapter: str, examples: list[Example], batch_size: int) -> dict[str, torch.Tensor]:
    """The LoRA branch as the dense matrix U diag(s) Vᵀ, differentiated with respect to s."""
    sigmas: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model, adapter).items():
        u, s, vh = directions(layer, adapter)
        sigma = s.clone().requires_grad_(True)
        sigmas[name] = sigma
        scaling = layer.scaling[adapter]

        def forward(
            x: Any, layer: Any = layer, u: Any = u, vh: Any = vh, sigma: Any = sigma, c: float = scaling
        ) -> Any:
            return layer.base_layer(x) + c * F.linear(x, u @ torch.diag(sigma) @ vh)

        layer.forward = forward
    for batch in nominal_batches(examples, batch_size):
        model_loss(model, batch).backward()
    return {name: sigma.grad for name, sigma in sigmas.items()}


def by_closed_form(model: Any, adapter: str, examples: list[Example], batch_size: int) -> dict[str, torch.Tensor]:
    """g = diag(T_Bᵀ Bᵀ (∂L/∂B) T_A) from ordinary LoRA gradients; U = B T_B, V = Aᵀ T_A."""
    model.zero_grad()
    for batch in nominal_batches(examples, batch_size):
        model_loss(model, batch).backward()
    found = {}
    for name, layer in lora_layers(model, adapter).items():
        b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        u, _, vh = directions(layer, adapter)
        t_b = torch.linalg.lstsq(b.detach(), u).solution
        t_a = torch.linalg.lstsq(a.detach().mT, vh.mT).solution
        found[name] = torch.diag(t_b.mT @ b.detach().mT @ b.grad @ t_a)
    return found


ORACLES = {"hooks": by_hooks, "autograd": by_autograd, "closed form": by_closed_form}

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {
        "rank_pattern": {"o_proj": 3, r"layers\.1\.mlp\.down_proj": 11},
        "alpha_pattern": {"q_proj": 5},
    },
    "attention and mlp": {"target_modules": "all-linear", "r": 4},
}


# The first selected layer's input needs no gradient, which the published method's hooks do not mind.
hook_warning = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def relative_difference(got: Any, wanted: dict[str, torch.Tensor]) -> float:
    assert set(got.modules) == set(wanted)
    return max(
        float((got.modules[name].g - wanted[name].double()).norm() / wanted[name].double().norm()) for name in wanted
    )


@hook_warning
@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_g_equals_every_independent_formula(oracle: str, setting: str) -> None:
    model = with_lora(tiny_llama(), **SETTINGS[setting])
    examples = ragged_examples()
    wanted = ORACLES[oracle](copy.deepcopy(model).double().eval(), "default", examples, 3)
    got = calibrate(model, "default", examples, batch_size=3)
    assert relative_difference(got, wanted) <= 1e-5


@hook_warning
@pytest.mark.parametrize("oracle", ORACLES)
def test_g_equals_every_independent_formula_with_several_adapters_loaded(oracle: str) -> None:
    from peft import LoraConfig

    model = with_lora(tiny_llama())
    model.add_adapter("other", LoraConfig(r=5, lora_alpha=3, target_modules=["o_proj", "up_proj"]))
    randomise_b(model, 9)
    model.set_adapter("other")
    examples = ragged_examples()
    wanted = ORACLES[oracle](copy.deepcopy(model).double().eval(), "other", examples, 2)
    assert relative_difference(calibrate(model, "other", examples), wanted) <= 1e-5


@hook_warning
@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_g_in_half_precision_is_within_two_percent(oracle: str, dtype: torch.dtype) -> None:
    """Of the whole vector: the model's own rounding alone moves single modules by up to 3 %, in the hook method too."""
    model = with_lora(tiny_llama(initializer_range=0.05)).to(dtype)
    examples = ragged_examples(24)
    wanted = ORACLES[oracle](copy.deepcopy(model).double().eval(), "default", examples, 2)
    got = calibrate(model, "default", examples)
    whole = torch.cat([wanted[name].double() for name in got.modules])
    assert float((torch.cat([module.g for module in got.modules.values()]) - whole).norm() / whole.norm()) <= 2e-2


def test_dora_is_differentiated_through_its_magnitude() -> None:
    model = with_lora(tiny_llama(), use_dora=True)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 1.0 + 0.3 * torch.rand_like(parameter)
    examples = ragged_examples()
    twin = copy.deepcopy(model).double().eval()
    losses = [model_loss(twin, batch).item() for batch in nominal_batches(examples, 3)]
    with spectral_form(model, "default", list(lora_layers(model, "default"))):
        assert calibration_loss(model, examples, 3) == pytest.approx(sum(losses), rel=1e-5)
    wanted = by_closed_form(twin, "default", examples, 3)
    assert relative_difference(calibrate(model, "default", examples, batch_size=3), wanted) <= 1e-5


def test_a_bias_on_lora_b_is_part_of_the_forward_pass() -> None:
    model = with_lora(tiny_llama(attention_bias=True, mlp_bias=True), lora_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    examples = ragged_examples()
    wanted = by_closed_form(copy.deepcopy(model).double().eval(), "default", examples, 3)
    assert relative_difference(calibrate(model, "default", examples, batch_size=3), wanted) <= 1e-5


def test_the_masked_loss_is_that_of_transformers() -> None:
    model = tiny_llama().eval()
    losses = [
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.item()
        for batch in nominal_batches(ragged_examples(), 3)
    ]
    assert calibration_loss(model, ragged_examples(), 3) == pytest.approx(sum(losses), rel=1e-5)


def test_g_is_a_sum_over_nominal_batches_of_mean_losses() -> None:
    model = with_lora(tiny_llama().double())
    examples = ragged_examples(6)
    whole = calibrate(model, "default", examples, batch_size=3)
    parts = [calibrate(model, "default", examples[start : start + 3], batch_size=3) for start in (0, 3)]
    for name, module in whole.modules.items():
        torch.testing.assert_close(module.g, parts[0].modules[name].g + parts[1].modules[name].g)
    assert (
        relative_difference(
            calibrate(model, "default", examples, batch_size=2), {k: v.g for k, v in whole.modules.items()}
        )
        > 1e-3
    )


def test_a_token_that_equals_the_padding_token_still_counts() -> None:
    model = with_lora(tiny_llama().double())
    ending_in_zero = [Example.continuation((5, 6, 7, 0), 2), Example.continuation((8, 9, 10, 11, 12, 0), 3)]
    assert (
        relative_difference(
            calibrate(model, "default", ending_in_zero),
            by_closed_form(copy.deepcopy(model).eval(), "default", ending_in_zero, 2),
        )
        <= 1e-9
    )


def state(model: Any) -> dict[str, Any]:
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, id(p.grad)) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(m._forward_hooks) + len(m._backward_hooks) for name, m in model.named_modules()},
    }


def test_the_model_is_left_as_it_was_found() -> None:
    model = with_lora(tiny_llama()).train()
    model_loss(model, next(nominal_batches(ragged_examples(), 2))).backward()
    before = state(model)
    calibrate(model, "default", ragged_examples())
    assert state(model) == before


def test_the_model_is_left_as_it_was_found_after_an_error_in_the_middle() -> None:
    model = with_lora(tiny_llama()).train()
    before = state(model)

    def failing(batches: Any) -> Any:
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, "default", ragged_examples(), progress=failing)
    assert state(model) == before


def test_no_activation_as_wide_as_x_is_kept_for_the_branch() -> None:
    """Only p (N × r) may be saved by the branch: its saved tensors are counted."""
    from spectral_fast.kernels.spectral_linear import spectral_linear

    x, y = torch.randn(10, 48, requires_grad=True), torch.randn(10, 32, requires_grad=True)
    u, s, vh = torch.randn(32, 4), torch.rand(4, requires_grad=True), torch.randn(4, 48)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        spectral_linear(x, y, u, s, vh, 2.0)
    assert sorted(map(tuple, saved)) == sorted([(10, 4), (32, 4), (4,), (4, 48)])


def test_nan_in_a_weight_is_reported_and_nothing_else_happens() -> None:
    model = with_lora(tiny_llama())
    model.get_submodule("base_model.model.lm_head").weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="loss is nan"):
        calibrate(model, "default", ragged_examples())


def test_an_infinite_gradient_names_its_module() -> None:
    model = with_lora(tiny_llama(), target_modules=["down_proj"])

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * float("inf")

    norm = model.get_submodule("base_model.model.model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda *hooked: Exploding.apply(hooked[-1]))
    with pytest.raises(ValueError, match=r"sensitivity of .*layers\.0\.mlp\.down_proj is NaN or infinite"):
        calibrate(model, "default", ragged_examples())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda m: m.merge_adapter(), "merged"),
        (lambda m: m.base_model.disable_adapter_layers(), "disabled"),
    ],
)
def test_adapters_that_do_not_act_are_refused(prepare: Any, message: str) -> None:
    model = with_lora(tiny_llama())
    prepare(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, "default", ragged_examples())


def test_unknown_modules_unlabelled_batches_and_long_samples_are_refused() -> None:
    model = with_lora(tiny_llama())
    with pytest.raises(ValueError, match="not a linear LoRA layer"):
        calibrate(model, "default", ragged_examples(), modules=["base_model.model.model.layers.0.mlp.gate_proj"])
    with pytest.raises(ValueError, match="samples 0 to 0 have no label"):
        calibrate(
            model, "default", [Example.continuation((1, 2, 3), 3), Example.continuation((1, 2, 3), 1)], batch_size=1
        )
    with pytest.raises(ValueError, match="has 65 tokens, but the model has only 64 positions"):
        calibrate(model, "default", [Example.continuation((1,) * 65, 3)])
    with pytest.raises(ValueError, match="at least one sample"):
        calibrate(model, "default", [])

"""However samples share passes: the same tokens, the same weights, the same g."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_batches import nominal_batches
from stream_models import FAMILIES, family_model
from tiny_models import with_lora

from spectral_fast.calibration import calibrate as calibrating
from spectral_fast.calibration.calibrate import calibrate, routed
from spectral_fast.calibration.data import Example
from spectral_fast.calibration.packed.attention import NAME
from spectral_fast.calibration.packed.decoder import LOGITS_AT_ONCE, Decoder, ready_for
from spectral_fast.calibration.packed.packing import LAYOUTS, packs
from spectral_fast.calibration.ranks import Ranks
from spectral_fast.calibration.spectral_form import lora_layers, per_sample, spectral_form


def examples(lengths: tuple[int, ...] = (9, 4, 21, 13, 2, 17, 8), seed: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Example.continuation(torch.randint(3, 97, (length,), generator=generator).tolist(), 1 + length // 3)
        for length in lengths
    ]


def plain(model: Any, samples: list[Example], batch_size: int) -> dict[str, torch.Tensor]:
    """g by autograd through σ in padded nominal batches and full logits, in float64."""
    model = model.double()
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # the others take no float64
    sigmas, handles = {}, []
    for name, layer in lora_layers(model, "default").items():
        u, s, vh = torch.linalg.svd(
            layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach(), full_matrices=False
        )
        r = layer.r["default"]
        u, sigma, vh = u[:, :r], s[:r].clone().requires_grad_(), vh[:r]
        sigmas[name] = sigma

        def hook(module: Any, args: Any, _: Any, u: Any = u, sigma: Any = sigma, vh: Any = vh) -> torch.Tensor:
            return module.base_layer(args[0]) + module.scaling["default"] * ((args[0] @ vh.mT) * sigma) @ u.mT

        handles.append(layer.register_forward_hook(hook))
    for batch in nominal_batches(samples, batch_size):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100).backward()
    for handle in handles:
        handle.remove()
    return {name: sigma.grad for name, sigma in sigmas.items()}


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "bloom", "gpt_oss", "falcon", "opt"])
def test_g_equals_autograd_through_padded_batches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {
        "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 97},
        "falcon": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 97},
        "opt": {"hidden_size": 32, "ffn_dim": 40, "word_embed_proj_dim": 32, "num_hidden_layers": 4, "vocab_size": 97}
        | {"num_attention_heads": 4, "max_position_embeddings": 64},
        "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 97},
    }
    config = {"target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"}
    if family in ("mixtral", "qwen3_moe"):
        config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = with_lora(odd_family(family, more.get(family, {})), **config)
    if family == "gemma4":  # float32's own rounding is 2.5e-5 here, by plain autograd as well
        model = model.double()
    padded = ("gemma2", "bloom", "gpt_oss", "falcon")  # whose attention has more to it, or is not transformers'
    layouts, lay_out = [], calibrating.packs

    def noting(*args: Any, layout: str, **kwargs: Any) -> Any:
        layouts.append(layout)
        return lay_out(*args, layout=layout, **kwargs)

    monkeypatch.setattr(calibrating, "packs", noting)
    got = calibrate(model, "default", examples(), batch_size=3, pack_tokens=40)
    assert layouts == (["packed", "padded"] if family in padded else ["packed"])
    for name, g in plain(model, examples(), 3).items():
        assert (got.modules[name].g - g).norm() <= 1e-5 * g.norm(), name


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi3", "mixtral"])
def test_the_shares_of_ranks_sum_to_g_by_autograd(family: str, size: int) -> None:
    """Without processes; `test_ranks.py` has these."""

    class Part(Ranks):
        def sum(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return dict(found)

    targets = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "o_proj"]
    model = with_lora(family_model(family), target_modules=targets)
    parts = [calibrate(model, "default", examples(), batch_size=3, ranks=Part(i, size)) for i in range(size)]
    for name, g in plain(model, examples(), 3).items():
        assert (sum(part.modules[name].g for part in parts) - g).norm() <= 1e-5 * g.norm(), name


def odd_family(family: str, changes: dict[str, Any]) -> Any:
    if family in FAMILIES:
        return family_model(family)
    from transformers import AutoConfig, AutoModelForCausalLM

    base = FAMILIES["qwen3_moe"][1] | {"num_local_experts": 3}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(changes or base))).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 25, 1000])
def test_every_layout_holds_every_sample_once_with_its_labels_and_weights(layout: str, tokens: int) -> None:
    samples = examples()
    seen = {}
    for pack in packs(samples, 2, tokens=tokens, layout=layout):
        assert len(pack.samples) == 1 or pack.input_ids.numel() <= tokens
        assert len(pack.samples) == 1 or layout != "single"
        ids, places = pack.input_ids.flatten(), pack.position_ids.flatten()
        for k, index in enumerate(pack.samples):
            start, example = int(pack.starts[k]), samples[index]
            assert ids[start : start + len(example.ids)].tolist() == list(example.ids)
            assert places[start : start + len(example.ids)].tolist() == list(range(len(example.ids)))
            labels = slice(int(pack.label_starts[k]), int(pack.label_starts[k + 1]))
            assert (pack.positions[labels] - start + 1).tolist() == [i for i, x in enumerate(example.labels) if x >= 0]
            assert pack.targets[labels].tolist() == [x for x in example.labels if x >= 0]
            mates = samples[index // 2 * 2 : index // 2 * 2 + 2]
            assert (pack.weights[labels] == 1 / sum(mate.n_labels for mate in mates)).all()
            seen[index] = seen.get(index, 0) + 1
    assert seen == dict.fromkeys(range(len(samples)), 1)


def test_a_sample_of_one_token_is_a_sample() -> None:
    model = with_lora(family_model("llama"))
    got = calibrate(model, "default", [Example((5,), (5,)), *examples()[:2]], batch_size=2)
    assert all((module.samples[0] == 0).all() and module.samples[1].any() for module in got.modules.values())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Example((), ()), "sample 1 has no tokens"),
        (Example((5, 97), (5, 97)), "sample 1 has token 97, but the model knows 97; is the tokenizer"),
        (Example((5, 6), (5, 97)), "sample 1 has token 97"),
        (Example((5, -3), (5, 5)), "sample 1 has token -3"),
        (Example((5,) * 65, (5,) * 65), "sample 1 has 65 tokens, but the model has only 64 positions"),
    ],
)
def test_samples_that_the_model_cannot_take_are_named(sample: Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(with_lora(family_model("llama")), "default", [examples()[0], sample])


def test_a_share_or_a_batch_size_that_cannot_be_is_refused_at_once() -> None:
    model = with_lora(family_model("llama"))
    with pytest.raises(ValueError, match="until_stable is a share"):
        calibrate(model, "default", examples(), until_stable=90)
    with pytest.raises(ValueError, match="calib_batch_size must be at least 1, got 0"):
        calibrate(model, "default", examples(), batch_size=0, until_stable=0.9)


def against_single(model: Any, samples: list[Example], monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest relative difference of g from that with a pass per sample."""
    got = calibrate(model, "default", samples)
    monkeypatch.setattr(calibrating, "routed", lambda _: True)
    wanted = calibrate(model, "default", samples).modules
    return max(float((got.modules[name].g - wanted[name].g).norm() / wanted[name].g.norm()) for name in wanted)


def test_masks_that_the_attention_is_not_told_of_otherwise_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-MoE's attention does not hand on its window, and Gemma 3 may see both ways."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base, qwen3 = FAMILIES["llama"][1], FAMILIES["qwen3_moe"][1]
    kinds = ["full_attention", "sliding_attention"] * 2
    window = {"use_sliding_window": True, "sliding_window": 5, "layer_types": kinds}
    torch.manual_seed(0)
    for family, config in (
        ("qwen2_moe", {**qwen3, **window, "shared_expert_intermediate_size": 24}),
        ("gemma3_text", {**base, "head_dim": 8, "sliding_window": 5, "use_bidirectional_attention": True}),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()
        assert against_single(with_lora(model, target_modules=["q_proj", "o_proj"]), examples(), monkeypatch) <= 1e-5


def test_samples_go_alone_where_the_longest_of_a_pass_changes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    half = 4
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * half, "long_factor": [3.0] * half, "factor": 4.0}
    model = with_lora(
        family_model("phi3", rope_parameters=rope, original_max_position_embeddings=16), target_modules=["o_proj"]
    )
    assert against_single(model, examples(), monkeypatch) <= 1e-5


def test_autocast_and_inputs_that_require_gradients_change_nothing() -> None:
    model = with_lora(family_model("llama"), layers_to_transform=[2])
    plainly = calibrate(model, "default", examples())
    model.enable_input_require_grads()
    needs = []
    Decoder(model).layers[1][1].register_forward_hook(lambda _, __, out: needs.append(out.requires_grad))
    with torch.autocast("cpu", torch.bfloat16):
        inside = calibrate(model, "default", examples())
    assert not any(needs)
    assert all((inside.modules[name].g == module.g).all() for name, module in plainly.modules.items())


def test_two_threads_calibrate_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    models = [with_lora(family_model(family)) for family in ("llama", "qwen3")]
    alone = [calibrate(model, "default", examples(), pack_tokens=40) for model in models]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda model: calibrate(model, "default", examples(), pack_tokens=40), models))
    for one, other in zip(alone, both, strict=True):
        for name, module in one.modules.items():
            torch.testing.assert_close(other.modules[name].g, module.g)


def test_padding_stands_on_the_right_and_is_masked_by_length() -> None:
    samples = [Example.continuation((7, 0, 9), 1), Example.continuation((5, 6, 7, 0, 0), 3)]
    [pack] = packs(samples, 2, layout="padded")
    assert pack.input_ids.tolist() == [[7, 0, 9, 0, 0], [5, 6, 7, 0, 0]]
    assert pack.attention_mask is not None
    assert pack.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_rows_without_padding_have_as_many_tokens_as_the_samples() -> None:
    samples = examples()
    total = sum(len(example.ids) for example in samples)
    assert sum(pack.input_ids.numel() for pack in packs(samples, 2, tokens=30)) == total


def test_a_sample_that_is_not_taken_still_counts_in_its_nominal_batch() -> None:
    [pack] = packs(examples(), 2, samples=[2])
    assert pack.weights[0] == 1 / sum(example.n_labels for example in examples()[2:4])


def test_a_batch_without_labels_is_an_error_that_names_its_samples() -> None:
    mute = Example.continuation((5, 6, 7), 3)
    with pytest.raises(ValueError, match="samples 2 to 3 have no label"):
        packs([*examples()[:2], mute, mute], 2)


def test_g_of_a_sample_does_not_depend_on_its_company() -> None:
    model = with_lora(family_model("llama"))
    together = calibrate(model, "default", examples(), batch_size=1)
    for index, example in enumerate(examples()):
        alone = calibrate(model, "default", [example], batch_size=1)
        for name, module in alone.modules.items():
            torch.testing.assert_close(together.modules[name].samples[index], module.samples[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "gemma3"])
def test_a_pack_is_as_large_as_the_memory_that_its_graph_takes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "o_proj"]
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_key_value_heads": 4, "head_dim": 64}
    model = with_lora(family_model(family, **sizes), target_modules=targets).bfloat16()
    decoder = Decoder(model)
    with spectral_form(model, "default", list(lora_layers(model, "default"))) as layers:
        [pack] = packs(examples((60, 60)), 2)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes() if storage.data_ptr() not in weights else 0
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with ready_for(decoder, "packed"), per_sample(layers, pack.starts), hooks:
            hidden = decoder.hidden(pack)
    assert hidden.requires_grad
    per_token = sum(kept.values()) / 120
    monkeypatch.setattr("spectral_fast.calibration.packed.decoder.GRAPH_BYTES", int(2000 * per_token))
    assert 2000 / 1.5 <= decoder.pack_tokens() <= 2000 * 1.5
    assert decoder.pack_tokens(1) == 4096


def test_the_attention_of_the_model_is_what_it_was() -> None:
    model = with_lora(family_model("llama"))
    before = model.config._attn_implementation
    calibrate(model, "default", examples())
    assert model.config._attn_implementation == before != NAME


def test_logits_come_in_bounded_chunks_and_sum_to_the_loss_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(family_model("gemma2"))  # caps its logits after the head
    [pack] = packs(examples(), 3, layout="padded")
    with torch.no_grad():
        hidden = decoder.hidden(pack)
    whole = decoder.loss_gradient(hidden, pack)
    sizes = []
    head = decoder.model.lm_head.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    monkeypatch.setattr("spectral_fast.calibration.packed.decoder.LOGITS_AT_ONCE", 97 * 5)
    loss, gradient = decoder.loss_gradient(hidden, pack)
    head.remove()
    assert sizes[:-1] == [5] * (len(sizes) - 1)
    assert sum(sizes) == len(pack.targets) < hidden.shape[0] * hidden.shape[1]
    assert loss == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(gradient, whole[1])
    assert LOGITS_AT_ONCE * 4 == 64 * 2**20


def test_a_lora_on_the_head_is_measured_per_sample() -> None:
    model = with_lora(family_model("qwen3"), target_modules=["lm_head", "o_proj"])
    got = calibrate(model, "default", examples(), batch_size=3, pack_tokens=40)
    wanted = plain(model, examples(), 3)
    assert any("lm_head" in name for name in wanted)
    for name, g in wanted.items():
        assert (got.modules[name].g - g).norm() <= 1e-5 * g.norm(), name


def test_only_a_lora_on_the_head_runs_no_graph_in_the_trunk() -> None:
    model = with_lora(family_model("qwen3"), target_modules=["lm_head"])
    grads = []
    handle = Decoder(model).trunk.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    calibrate(model, "default", examples())
    handle.remove()
    assert grads == [False] * len(grads) != []


def test_nothing_is_differentiated_below_the_lowest_module() -> None:
    model = with_lora(family_model("llama"), layers_to_transform=[2])
    needs = {}
    for index, layer in enumerate(Decoder(model).layers[1]):
        layer.register_forward_hook(lambda _, __, out, i=index: needs.update({i: out.requires_grad}))
    calibrate(model, "default", examples())
    assert needs == {0: False, 1: False, 2: True, 3: True}


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("base_model.model.model.layers.3.mlp.experts.7.w1", True),
        ("base_model.model.model.layers.3.self_attn.o_proj", False),
        ("base_model.model.transformer.h.0.mlp.experts.11", True),
        ("base_model.model.lm_head", False),
    ],
)
def test_an_expert_is_known_by_its_name(name: str, expert: bool) -> None:
    assert routed(name) is expert

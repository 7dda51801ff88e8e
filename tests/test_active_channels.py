"""The predictor of active channels: its factors, its scores by definition, and its recall on a trained model."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from spectral_fast import embedded
from spectral_fast.calibration.data import IGNORED, Example
from spectral_fast.cli import main
from spectral_fast.study.active_channels import _padded, _rows, _watched
from spectral_fast.study.channel_scores import Attention, Block, FeedForward, LowRank, Scores, find_blocks
from spectral_fast.study.options import ActiveChannelOptions

EXAMPLES = [Example.continuation(range(3, 3 + length), prompt) for length, prompt in ((11, 6), (5, 2), (8, 7))]


def odd_llama() -> Any:
    """Four query heads, two of keys and values, and biases, which predictions must take in."""
    model = tiny_llama(attention_bias=True)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def scores_of(model: Any, blocks: list[Block], examples: list[Example], **how: bool) -> dict[tuple[str, str], Scores]:
    ids, mask, counted = _padded(examples, **{"context_only": False, **how})
    with _watched(blocks, counted) as seen:
        model(input_ids=ids, attention_mask=mask)
    return {(block.name, part): scores for block in blocks for part, scores in block.scores(seen(block))}


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (5, 30)])
def test_the_factors_are_the_truncated_svd_with_the_root_of_s_in_each(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    layer.weight.data = torch.randn(shape, generator=generator)
    low = LowRank.of(layer, 8)
    r = min(8, *shape)
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(low.a @ low.b, (u[:, :r] * s[:r]) @ vh[:r], rtol=0, atol=1e-4)
    torch.testing.assert_close(low.a.mT @ low.a, torch.diag(s[:r]), rtol=0, atol=1e-3)
    torch.testing.assert_close(low.b @ low.b.mT, torch.diag(s[:r]), rtol=0, atol=1e-3)


def test_factors_of_trained_weights_are_as_good_as_the_svd() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded.base_model_dir(), dtype=torch.float32)
    for name in ("gate_proj", "up_proj"):
        layer = getattr(model.model.layers[1].mlp, name)
        low = LowRank.of(layer, 8)
        s = torch.linalg.svdvals(layer.weight.detach())
        left = (layer.weight.detach() - low.a @ low.b).norm()
        assert left <= s[8:].norm() * (1 + 1e-4)


def test_a_predictor_of_full_rank_that_sees_every_token_is_the_oracle() -> None:
    model = odd_llama()
    options = ActiveChannelOptions(rank=999, sparsity=(0.3, 0.5, 0.9))
    rows = _rows(model, find_blocks(model, options.rank), EXAMPLES, 2, options, iter)
    exact = [row for row in rows if row["method"] == "svd_per_token"]
    assert len(exact) == 3 * 3 * 3  # layers, parts, sparsities
    assert {row["recall"] for row in exact} == {1.0}
    assert all(row["energy_kept"] == pytest.approx(row["energy_oracle"]) for row in exact)
    assert min(row["recall"] for row in rows if row["method"] == "svd") < 1.0  # averages are not the tokens


def test_the_scores_are_norms_over_the_tokens_that_count() -> None:
    model = odd_llama()
    blocks = find_blocks(model, 8)
    assert [type(block) for block in blocks] == [Attention, FeedForward] * 3
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "gate_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for example in EXAMPLES:  # one by one, without padding
            model(input_ids=torch.tensor([example.ids]))
    alone = {name: [x[0] for x in several] for name, several in inputs.items()}
    inputs.clear()
    found = scores_of(model, blocks, EXAMPLES)

    layer = model.model.layers[1]
    with torch.no_grad():
        xs = alone["model.layers.1.mlp.gate_proj"]
        x, mean = torch.cat(xs), torch.stack([x.mean(0) for x in xs])
        mlp, (gate, up) = layer.mlp, (LowRank.of(layer, 8) for layer in (layer.mlp.gate_proj, layer.mlp.up_proj))
        norms = (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).norm(dim=0)
        weighted = mlp.down_proj.weight.abs() * norms
        wanted = {
            "oracle": norms,
            "svd": (mlp.act_fn(mean @ gate.b.mT @ gate.a.mT) * (mean @ up.b.mT @ up.a.mT)).norm(dim=0),
            "svd_per_token": (mlp.act_fn(x @ gate.b.mT @ gate.a.mT) * (x @ up.b.mT @ up.a.mT)).norm(dim=0),
            "wanda": sum(row / row.sum() for row in weighted),
        }
        for method, scores in found["model.layers.1.mlp", "ffn"].items():
            torch.testing.assert_close(scores, wanted[method], rtol=1e-4, atol=1e-5)

        x = torch.cat(alone["model.layers.1.self_attn.q_proj"])
        attention = layer.self_attn
        q, k = attention.q_proj(x).norm(dim=0), attention.k_proj(x).norm(dim=0)
        # Channel c of key head h goes with channel c of the query heads 2 h and 2 h + 1; a head has 12 channels.
        product = [(q[24 * (i // 12) + i % 12] + q[24 * (i // 12) + 12 + i % 12]) / 2 * k[i] for i in range(24)]
        torch.testing.assert_close(
            found["model.layers.1.self_attn", "qk"]["oracle"], torch.stack(product), rtol=1e-4, atol=0
        )
        v = attention.v_proj(x).norm(dim=0)
        torch.testing.assert_close(found["model.layers.1.self_attn", "vo"]["oracle"], v, rtol=1e-4, atol=0)


def test_the_answer_can_be_left_out_of_the_scores() -> None:
    model = odd_llama()
    blocks = find_blocks(model, 8)
    prompts = [Example(e.ids[: e.labels.count(IGNORED)], (IGNORED,) * e.labels.count(IGNORED)) for e in EXAMPLES]
    context, whole = scores_of(model, blocks, EXAMPLES, context_only=True), scores_of(model, blocks, EXAMPLES)
    for key, scores in scores_of(model, blocks, prompts).items():  # causal: what follows a prompt does not change it
        for method, values in scores.items():
            torch.testing.assert_close(context[key][method], values, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(whole[key][method], values, rtol=1e-4, atol=1e-5)


def test_the_hooks_are_gone_afterwards() -> None:
    model = odd_llama()
    scores_of(model, find_blocks(model, 8), EXAMPLES)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("active") / "out"
    argv = ["--base_model", str(embedded.base_model_dir()), "--calib_data", str(embedded.calibration_file())]
    assert main(["active-channels", *argv, "--calib_samples", "8", "--out_dir", str(folder)]) == 0
    with (folder / "active_channels.csv").open(newline="", encoding="utf-8") as file:
        return folder, list(csv.DictReader(file))


def test_the_command_tells_every_block_part_sparsity_and_method(measured: tuple[Path, list[dict[str, str]]]) -> None:
    folder, rows = measured
    wanted = {
        (layer, part, sparsity, method)
        for layer in "0123"
        for part in ("ffn", "qk", "vo")
        for sparsity in ("0.5", "0.8", "0.9", "0.97")
        for method in ("svd", "svd_per_token", "random", *(["wanda"] if part == "ffn" else []))
    }
    assert {(row["layer"], row["part"], row["sparsity"], row["method"]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert int(row["kept"]) == max(1, int(int(row["channels"]) * (1 - float(row["sparsity"]))))
        assert float(row["energy_kept"]) <= float(row["energy_oracle"]) + 1e-12
    assert (folder / "active_channels.png").read_bytes().startswith(b"\x89PNG")


def test_the_predictor_beats_chance_on_a_trained_model_and_random_channels_do_not(
    measured: tuple[Path, list[dict[str, str]]],
) -> None:
    for part in ("ffn", "qk", "vo"):
        for method in ("svd", "svd_per_token", "random"):
            some = [
                row for row in measured[1] if (row["part"], row["method"], row["sparsity"]) == (part, method, "0.8")
            ]
            chance = [int(row["kept"]) / int(row["channels"]) for row in some]
            excess = sum(float(row["recall"]) for row in some) / len(some) - sum(chance) / len(chance)
            kept, channels = int(some[0]["kept"]), int(some[0]["channels"])
            draws = 4 * len(some)  # batches times layers; each a hypergeometric draw of `kept`
            spread = math.sqrt(chance[0] * (1 - chance[0]) * (channels - kept) / (channels - 1) / kept / draws)
            assert (excess > 5 * spread) == (method != "random"), (part, method, excess, spread)
            assert method != "random" or abs(excess) < 5 * spread


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--sparsity", "1.0"], 2, "sparsity must be one or more shares in [0, 1)"),
        (["--rank", "0"], 2, "--rank: must be at least 1; got 0"),
        (["--until_stable", "0.9"], 2, "--until_stable has no meaning here"),
        (["--calib_data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], status: int, message: str
) -> None:
    base = ["--base_model", str(embedded.base_model_dir()), "--calib_data", str(embedded.calibration_file())]
    try:
        got = main(["active-channels", *base, "--out_dir", str(tmp_path / "out"), *argv])
    except SystemExit as exit_:
        got = int(exit_.code or 0)
    assert got == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "active_channels.csv").touch()
    data = tmp_path / "data.jsonl"
    data.write_bytes(embedded.calibration_file().read_bytes())
    base = ["--base_model", str(embedded.base_model_dir()), "--calib_data", str(data)]
    with pytest.raises(SystemExit):
        main(["active-channels", *base, "--out_dir", str(tmp_path), "--overwrite"])
    assert "is inside --out_dir" in capsys.readouterr().err
    assert data.is_file()


def test_a_model_of_another_kind_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no blocks of linear layers named gate_proj"):
        find_blocks(model, 8)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = odd_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        find_blocks(model, 8)


def test_the_json_has_the_means_over_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--base_model", str(embedded.base_model_dir()), "--calib_data", str(embedded.calibration_file())]
    argv = [
        "--calib_samples",
        "2",
        "--sparsity",
        "0.75",
        "--context_only",
        "--json",
        "--out_dir",
        str(tmp_path / "out"),
    ]
    assert main(["active-channels", *base, *argv]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["samples"], result["blocks"], result["rank"]) == (2, 8, 8)
    for mean in result["summary"]:
        some = [row for row in result["rows"] if (row["part"], row["method"]) == (mean["part"], mean["method"])]
        assert mean["recall"] == pytest.approx(sum(row["recall"] for row in some) / 4)

"""The page on scaling says what its code computes, and the code counts what runs really do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import calibration, cases, models, samples, scaling, streamed, tasks
from benchmarks.peers_calibration import ADAPTER
from spectral_fast.calibration.calibrate import calibrate
from spectral_fast.calibration.packed.decoder import Decoder, ready_for
from spectral_fast.calibration.packed.packing import packs
from spectral_fast.calibration.packed.products import float32_is_faster
from spectral_fast.calibration.spectral_form import lora_layers, per_sample, spectral_form
from spectral_fast.calibration.streaming.stream import streamed as engine

SHAPE = scaling.Shape.of(cases.TINY_LLAMA)


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    return samples.examples(cases.TINY_LLAMA.samples)


def test_the_page_shows_what_the_code_computes() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert page == scaling.page(page)


def test_the_samples_of_the_page_are_those_of_the_benchmark() -> None:
    if cases.SAMPLES != "GSM8K":
        pytest.skip(f"GSM8K is not in {cases.GSM8K}")
    assert scaling.Work.of(samples.examples(32), 64) == scaling.SAMPLES


def test_shapes_have_their_known_numbers_of_parameters() -> None:
    sizes = [round(shape.parameters / 1e9, 2) for shape in scaling.MODELS]
    assert sizes == [8.03, 70.55, 405.85]
    case = tasks.STREAM.case
    assert isinstance(case, cases.Calibration)
    assert round(scaling.Shape.of(case).parameters * 2 / 1e9, 1) == 13.5


def test_operations_are_those_that_torch_counts(examples: list[Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # In float32, so that no product is made in another way; attention is a kernel whose operations torch counts
    # without a mask, and the branch is an operator of our own: both are left out on both sides.
    model = models.peft_model(replace(cases.TINY_LLAMA, dtype="float32"))
    [pack] = packs(examples, 2, tokens=10**9)
    passes = calibration.Passes(model, pack)
    with FlopCounterMode(display=False) as counter:
        passes.with_g(pack.starts)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    work = scaling.Work.of(examples, rank=0)
    assert counted == scaling.flops(SHAPE, replace(work, pairs=0), recomputed=False)


@pytest.mark.parametrize("shape", scaling.MODELS, ids=lambda shape: shape.name)
def test_packs_are_as_large_as_calibration_makes_them(shape: scaling.Shape) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.layers
    )
    with torch.device("meta"):
        decoder = Decoder(LlamaForCausalLM(config).to(torch.bfloat16))
    for layers in (None, 1):
        counted = scaling.pack(shape, scaling.SAMPLES, layers or shape.layers)
        assert counted == min(scaling.SAMPLES.tokens, decoder.pack_tokens(layers))


def test_autograd_keeps_what_is_counted(examples: list[Any]) -> None:
    model = models.peft_model(cases.TINY_LLAMA)
    [pack] = packs(examples, 2, tokens=10**9)
    decoder = Decoder(model)
    with (
        spectral_form(model, ADAPTER, list(lora_layers(model, ADAPTER))) as layers,
        ready_for(decoder, "packed"),
        per_sample(layers, pack.starts),
    ):
        weights = {x.untyped_storage().data_ptr() for x in model.state_dict().values()}
        weights |= {x.untyped_storage().data_ptr() for m in layers.values() for x in (m.u, m.vh, m.s)}
        kept = calibration.saved_bytes(lambda: decoder.hidden(pack), weights)
    tokens = pack.input_ids.numel()
    counted = scaling.kept(SHAPE, tokens, cases.TINY_LLAMA.rank, attention=4 if float32_is_faster() else 2)
    # On top: variances of the norms in float32, and the rotations, once for all layers.
    norms, rotations = 2 * SHAPE.layers * 4, 2 * 2 * SHAPE.hidden // SHAPE.heads
    assert kept == pytest.approx(counted + tokens * (norms + rotations), rel=0.005)


def test_streaming_reads_and_keeps_on_disk_what_is_counted(examples: list[Any], tmp_path: Path) -> None:
    models.write(cases.TINY_LLAMA, tmp_path / "case")
    model, weights = streamed.skeleton(cases.TINY_LLAMA, tmp_path / "case")
    largest = 0

    def watched(steps: Any) -> Any:
        nonlocal largest
        for step in steps:
            yield step
            on_disk = [path for path in (tmp_path / "work").rglob("inputs-*") if path.is_file()]
            largest = max(largest, sum(path.stat().st_size for path in on_disk))

    (tmp_path / "work").mkdir()
    calibrate(
        model,
        "default",
        examples,
        batch_size=2,
        progress=watched,
        engines=lambda *args: engine(*args, weights=weights, folder=tmp_path / "work", budget=0),
    )
    norms = 2 * cases.TINY_LLAMA.hidden * (2 * cases.TINY_LLAMA.layers + 1)
    assert weights.bytes_read == pytest.approx(scaling.weights_read(SHAPE), abs=2 * norms)
    header = 4096
    work = scaling.Work.of(examples, cases.TINY_LLAMA.rank)
    assert largest == pytest.approx(scaling.inputs(SHAPE, work), abs=header * (SHAPE.layers + 1))

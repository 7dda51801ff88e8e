"""The model card: what an adapter's folder tells of how it was made and how it did, and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from adapter_tools import handmade
from extract_tools import low_rank, two_models
from huggingface_hub import ModelCard, ModelCardData
from lslora_tools import splined
from sweep_tools import sweep, write_configs
from toolbox_tools import peft_adapter

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.cli import main
from spectral_fast.evaluation.evaluate import Gsm8k, write_metrics
from spectral_fast.evaluation.humaneval import HumanEval
from spectral_fast.evaluation.profiles import PROFILES, Profile
from spectral_fast.publish import Upload, push_to_hub

BASE = ["--base_model", str(embedded.base_model_dir())]


def looked_at(folder: Path, **options: Any) -> Upload:
    return push_to_hub(folder, "someone/it", dry_run=True, **options)


def card_of(folder: Path, **options: Any) -> ModelCard:
    """The card, as a reader on the hub has it: its metadata parsed by the hub's own classes."""
    card = ModelCard(looked_at(folder, **options).card)
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    return card


CALIBRATION = ["--calib_data", str(embedded.calibration_file()), "--calib_samples", "2", "--layer_min", "3"]
ADAPTER = str(embedded.adapter_dir())
SHA256 = Adapter.open(ADAPTER).fingerprint()


@pytest.mark.parametrize(
    ("argv", "told", "tags"),
    [
        (
            ["edit", *BASE, "--lora_path", ADAPTER, *CALIBRATION, "--amp_factor", "1.5", "--grad_norm", "l2"],
            [
                "12 amplified, 12 suppressed, of 64",
                "2 samples of `./calibration.jsonl`",
                "grad_norm = l2",
                "layer_min = 3",
            ],
            ["spectral-editing", "abs_select"],
        ),
        (
            ["edit", *BASE, "--lora_path", ADAPTER, *CALIBRATION, "--mode", "gd", "--asymmetric_update"],
            ["64, each by a step of its own", "asymmetric_update = True"],
            ["spectral-editing", "gd"],
        ),
        (
            ["edit", "--lora_path", ADAPTER, "--mode", "random_index", "--seed", "3", "--target_modules", "q_proj"],
            ["drawn at random: this is a control", "4: q_proj (4)", "seed = 3"],
            ["spectral-editing", "random_index"],
        ),
        (
            ["prune", "--lora_path", ADAPTER, "--method", "random", "--keep_ratio", "0.25", "--compact"],
            ["160 of 640", "keep_ratio = 0.25", f"`./adapter` (sha256 `{SHA256}`)"],
            ["pruned"],
        ),
        (["resize", "--lora_path", ADAPTER, "--energy", "0.9"], ["120 of 640", "energy = 0.9"], ["resized"]),
        (["clip", "--lora_path", ADAPTER, "--multiple", "3"], ["126 singular values", "multiple = 3.0"], ["clipped"]),
        (["export", "--lora_path", ADAPTER, "--bake_scaling", "--rank", "40"], ["relative error of ΔW | 0.00%"], []),
        (
            ["merge", "--lora_path", ADAPTER, ADAPTER, "--weights", "0.5", "-0.25", "--rank", "8"],
            [f"0.5 × `./adapter` (sha256 `{SHA256}`) + -0.25 × `./adapter`", "rank = 8"],
            ["merge"],
        ),
    ],
)
def test_every_commands_record_becomes_a_text_and_a_table(
    tmp_path: Path, argv: list[str], told: list[str], tags: list[str]
) -> None:
    assert main([*argv, "--out_dir", str(tmp_path / "made")]) == 0
    card = card_of(tmp_path / "made")
    for text in told:
        assert text in card.text
    assert card.data.tags == ["lora", "spectral_fast", *tags]
    assert str(embedded.adapter_dir().parent) not in str(card)


def test_an_extraction_names_both_models(tmp_path: Path) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    out = tmp_path / "lora"
    assert main(["extract", "--base_model", base, "--tuned_model", tuned, "--rank", "3", "--out_dir", str(out)]) == 0
    assert f"| made from | `./{Path(tuned).name}` less `./{Path(base).name}` |" in card_of(out).text


def test_steps_are_told_in_their_order(tmp_path: Path) -> None:
    pruned, exported = str(tmp_path / "pruned"), str(tmp_path / "exported")
    assert main(["prune", "--lora_path", ADAPTER, "--out_dir", pruned]) == 0
    assert main(["export", "--lora_path", pruned, "--bake_scaling", "--out_dir", exported]) == 0
    text = card_of(tmp_path / "exported").text
    assert -1 < text.index("### Pruning") < text.index("### Export")


def test_a_checkpoint_of_train_tells_its_settings(tmp_path: Path) -> None:
    from spectral_fast.training import load
    from spectral_fast.training.folder import RunFolder

    out = tmp_path / "trained"
    flags = {"model_name_or_path": "meta-llama/Llama-3.1-8B", "lora_r": 4, "use_rslora": True}
    flags |= {"train_dataset_path": "gsm8k", "slora_enable": True, "slora_burn_in": 3}
    words = ["--output_dir", str(out), "--learning_rate", "1e-3", "--max_steps", "9", "--packing"]
    settings = load(None, flags, words)
    RunFolder(out, None).begin(settings)
    peft_adapter(out / "final_checkpoint")
    card = card_of(out / "final_checkpoint", base_model="meta-llama/Llama-3.1-8B")
    assert card.data.datasets == ["openai/gsm8k"]
    assert {"sft", "trl"} < set(card.data.tags)
    assert "| model | model_name_or_path = meta-llama/Llama-3.1-8B, use_rslora = True, lora_r = 4 |" in card.text
    assert "| slora | enable = True, burn_in = 3" in card.text
    for setting in ("learning_rate = 0.001", "max_steps = 9", "packing = True"):
        assert setting in card.text


def test_an_adapter_of_somebody_else_is_described_without_a_history(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "gpt2", "rank_pattern": {"layers.1.mlp.down_proj": 4}, "use_rslora": True}
    adapter = handmade(tmp_path / "adapter", {**config, "task_type": "CAUSAL_LM"})
    card = card_of(adapter)
    assert card.data.to_dict() == {
        "base_model": "gpt2",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "spectral_fast", "rslora"],
    }
    assert "| scaling | 4 |" in card.text
    assert "The folder has no record of spectral_fast" in card.text
    assert "**These weights were not evaluated**" in card.text


def test_what_vllm_would_not_serve_is_not_offered_to_it(tmp_path: Path) -> None:
    served = card_of(handmade(tmp_path / "plain", {"r": 4})).text
    assert "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --lora-modules it=someone/it" in served
    assert "vllm serve" not in card_of(peft_adapter(tmp_path / "dora", use_dora=True)).text


def test_an_ls_lora_says_who_loads_it(tmp_path: Path) -> None:
    splined().save_pretrained(tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert "import spectral_fast.lslora" in card.text
    assert "vllm" not in card.text
    assert "ls-lora" in card.data.tags


class Engine:
    """Of the name only: the texts are given."""

    name: ClassVar[str] = "fake"
    settings: ClassVar[dict[str, str]] = {"dtype": "float32"}

    def generate(self, *_: Any, **__: Any) -> list[list[str]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def evaluated(
    adapter: Path, out_dir: Path, right: int, variant: str | None = None, profile: Profile | None = None
) -> Any:
    """A result of 8 problems, as `eval` leaves it."""
    problems = [{"question": "?", "answer": f"#### {i}"} for i in range(8)]
    task = Gsm8k(problems, [], profile or Profile(num_fewshot=0))
    meta = {"adapter_files_sha256": Adapter.open(adapter).hashes, "eval_data": str(adapter.parent / "held-out.jsonl")}
    if profile is not None:
        meta |= {"eval_data": "gsm8k", "profile": profile.profile}
    texts = [[f"#### {i if i < right else -1}"] for i in range(8)]
    return task.record(texts, out_dir, engine=Engine(), variant=variant, meta=meta)


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    out = tmp_path / "edited"
    assert main(["edit", "--lora_path", ADAPTER, "--mode", "random_index", "--out_dir", str(out)]) == 0
    return out


def test_figures_are_those_of_these_weights_before_and_after(edited: Path) -> None:
    both = [
        evaluated(folder, edited, right, name)
        for name, folder, right in (("baseline", embedded.adapter_dir(), 4), ("edited", edited, 6))
    ]
    write_metrics(*both, edited, {})
    card = card_of(edited)
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.75, "test")
    assert (result.dataset_type, result.dataset_name) == ("held-out.jsonl", "./held-out.jsonl")
    assert result.metric_args["problems"] == 8
    assert result.metric_args["standard_error"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    assert result.metric_args["engine"] == "fake"
    assert "| this adapter | `./held-out.jsonl` (test) | accuracy | 75.00 ± 15.31 | 8 |" in card.text
    assert "| what it was made from | `./held-out.jsonl` (test) | accuracy | 50.00 ± 17.68 | 8 |" in card.text
    assert "+25.00 points against the original on the same 8 problems" in card.text
    assert "What random edits of this size would have done was not measured." in card.text


def test_figures_elsewhere_are_found_where_they_are_said_to_be_and_a_profile_names_its_data(
    edited: Path, tmp_path: Path
) -> None:
    evaluated(edited, tmp_path / "results", 6, profile=PROFILES["greedy_math"])
    assert card_of(edited).data.eval_results is None
    card = card_of(edited, results=[tmp_path / "results"])
    [result] = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("openai/gsm8k", "GSM8K")
    assert result.metric_args["profile"] == "greedy_math"
    assert "profile = greedy_math" in card.text
    assert "It was not compared with another adapter on the same problems." in card.text
    with pytest.raises(FileNotFoundError, match="results are a folder that eval"):
        card_of(edited, results=[tmp_path / "nowhere"])


def test_programs_are_scored_as_they_were(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Outcome:
        passed: bool

    task = HumanEval(
        [{"task_id": f"X/{i}", "prompt": "", "entry_point": "f", "test": ""} for i in range(4)],
        PROFILES["paper_code_main"],
    )
    monkeypatch.setattr(HumanEval, "_run", lambda *_: ([Outcome(i % 4 == 0) for i in range(200)], "landlock"))
    meta = {"adapter_files_sha256": Adapter.open(edited).hashes, "eval_data": "humaneval", "profile": "paper_code_main"}
    task.record([["pass"] * 50] * 4, edited, engine=Engine(), meta={**meta, "lora_dir": str(edited)})
    [result] = card_of(edited).data.eval_results
    assert (result.dataset_type, result.metric_type) == ("openai/openai_humaneval", "pass@1")
    assert result.metric_value == pytest.approx(0.25, abs=0.01)
    assert (result.metric_args["problems"], result.metric_args["generations"]) == (4, 50)
    assert result.metric_args["temperature"] == 0.2


def test_figures_of_other_weights_are_left_out_with_a_warning(edited: Path) -> None:
    evaluated(edited, edited, 8)
    config = json.loads((edited / "adapter_config.json").read_text())
    (edited / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    found = looked_at(edited)
    assert "**These weights were not evaluated**" in found.card
    assert any("eval_config.json is left out: it is of other weights" in warning for warning in found.warnings)


@pytest.mark.parametrize("change", [{"engine": None, "metric": {}}, {"metric": {"score": "x" * 9}}, {"decoding": 3}])
def test_a_broken_result_is_named(edited: Path, change: dict[str, Any]) -> None:
    evaluated(edited, edited, 8)
    result = json.loads((edited / "eval_config.json").read_text())
    (edited / "eval_config.json").write_text(json.dumps({**result, **change}))
    with pytest.raises(ValueError, match=r"eval_config\.json is no result of spectral_fast"):
        card_of(edited)


def test_an_adapter_of_a_sweep_stands_beside_its_random_controls(tmp_path: Path) -> None:
    lines = [{"edit_mode": "abs_select", "amp_factor": factor, "keep_adapter": True} for factor in (1.5, 2.0)]
    sweep(write_configs(tmp_path, lines), tmp_path / "sweep", controls=2)
    folder = next((tmp_path / "sweep" / "runs").glob("*/adapter"))
    card = card_of(folder)
    assert "one of 2 variants of a sweep: " in card.text
    assert "after Holm's correction over all variants). 2 random edits of the same size came to " in card.text
    [result] = card.data.eval_results
    assert result.dataset_name == "./problems.jsonl"
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert card_of(tmp_path / "elsewhere").data.eval_results is None
    assert card_of(tmp_path / "elsewhere", results=[tmp_path / "sweep"]).text == card.text


def test_the_sources_card_is_kept_below_and_its_metadata_merged(edited: Path) -> None:
    from huggingface_hub import EvalResult

    result = EvalResult("text-generation", "openai/gsm8k", "GSM8K", "accuracy", 0.9)
    data = ModelCardData(
        license="llama2",
        language=["en", "de"],
        tags=["chat", "base_model:adapter:/home/someone/llama"],
        datasets="org/data",
        base_model="org/base",
        model_name="x",
        eval_results=[result],
        license_link="https://example.com/a/b/c",
    )
    text = f"# Größe\n\nTrained in {edited}/x, served at /api/v1/models by #!/usr/bin/env python.\n"
    (edited / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{text}", encoding="utf-8")
    found = looked_at(edited)
    card = ModelCard(found.card)
    assert (card.data.license, card.data.language, card.data.datasets) == ("llama2", ["en", "de"], ["org/data"])
    assert card.data.license_link == "https://example.com/a/b/c"
    assert card.data.base_model == "org/base"  # adapter_config.json has a path
    assert card.data.tags == ["chat", "lora", "spectral_fast", "spectral-editing", "random_index"]
    assert card.data.eval_results is None  # of the source, not of this
    assert "# Größe\n\nTrained in ./x, served at /api/v1/models by #!/usr/bin/env python." in card.text
    assert str(edited.parent) not in found.card


def test_a_folder_that_is_published_again_does_not_quote_its_own_card(edited: Path) -> None:
    (edited / "README.md").write_text("Of the source.\n")
    first = looked_at(edited).card
    (edited / "README.md").write_text(first)
    assert looked_at(edited).card == first
    assert first.count("Of the source.") == 1


@pytest.mark.parametrize(
    ("readme", "kept"),
    [
        (b"\xef\xbb\xbf---\nlicense: mit\n---\n\xff Text.\n", "\n\ufffd Text."),
        (b"---\nno end of it\n", "no end of it"),
        (b"---\ndate: 2024-01-01\ntags: one\nmodel-index: 3\neval_results: 2\n---\nText.\n", "\nText."),
    ],
)
def test_a_readme_that_is_not_quite_a_card_is_quoted(edited: Path, readme: bytes, kept: str) -> None:
    (edited / "README.md").write_bytes(readme)
    card = card_of(edited)
    assert kept in card.text
    assert {"lora", "spectral_fast"} <= set(card.data.tags)


@pytest.mark.parametrize("front", ["license: [mit", "- a\n- b", "1: 2", "self: 1"])
def test_front_matter_that_is_no_metadata_is_refused(edited: Path, front: str) -> None:
    (edited / "README.md").write_text(f"---\n{front}\n---\nText.\n")
    with pytest.raises(ValueError, match=r"README\.md: what is between its two lines --- is no metadata \("):
        looked_at(edited)


def test_what_has_no_license_or_another_task_is_not_passed_off_as_a_language_model(tmp_path: Path) -> None:
    adapter = handmade(tmp_path / "adapter", {"task_type": "SEQ_CLS", "base_model_name_or_path": "org/base"})
    card = card_of(adapter)
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained('org/base')" in card.text
    assert "CausalLM" not in card.text
    assert "vllm" not in card.text
    assert any("has no license" in warning for warning in looked_at(adapter).warnings)
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    assert card_of(adapter).data.license == "mit"
    assert not any("has no license" in warning for warning in looked_at(adapter).warnings)

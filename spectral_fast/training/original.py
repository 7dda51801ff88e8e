"""The YAML of the gated training that this one goes back to, read in the words of this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LORA = "lora"  # a section of its own there
# Section -> its key -> ours, wherever that belongs.
_NAMES: dict[str, dict[str, str]] = {
    "model": {"name": "model_name_or_path", "bnb_4bit_use_double_quant": "use_bnb_nested_quant"},
    "training": {"warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy"},
    LORA: {
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "target_modules": "lora_target_modules",
        "task_type": "lora_task_type",
    },
    "data": {
        "dataset_name": "train_dataset_path",
        "eval_split": "val_split",
        "max_seq_length": "max_length",
        "prompt_field": "question_column",
        "response_field": "answer_column",
    },
    "slora": {"novelty_scaler": "slora_target_novelty_scaler"},
    "logging": {"wandb_project": "project", "wandb_run_name": "run_name", "report_to": "report_to"},
}
# What can be said in one way only here: the value that means that, and what else to do.
_FIXED = {
    ("model", "bnb_4bit_compute_dtype"): ("bfloat16", "give dtype, which 4-bit weights are computed in, too"),
    (LORA, "bias"): ("none", "biases are not trained here; leave it out"),
}


def in_our_words(section: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stands in a section, parted: keys by the original's names, told by ours; and all others, as they are.

    Raises:
        ValueError: a value that has no counterpart here, with what to do.
    """
    names = _NAMES.get(section, {})
    ours: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in values.items():
        if name in names:
            ours[names[name]] = value
        elif (section, name) in _FIXED:
            only, instead = _FIXED[section, name]
            if value not in (None, only):
                raise ValueError(f"{name} of section {section} can be {only} only, got {value!r}: {instead}")
        elif (section, name) == ("model", "use_flash_attention_2"):
            ours |= {"attn_implementation": "flash_attention_2"} if value else {}
        elif (section, name) == ("logging", "use_wandb"):
            ours["report_to"] = values.get("report_to") or ("wandb" if value else "none")
        else:
            others[name] = value
    if section == "data" and values.get("eval_split") is not None and "dataset_name" in values:
        ours["val_dataset_path"] = values["dataset_name"]
    return ours, others

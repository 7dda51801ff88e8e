"""One training, understood: a YAML file and flags to checked settings, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from spectral_fast.options import nearest, take
from spectral_fast.splines import PRESETS
from spectral_fast.training.options import DataArguments, GateArguments, LoggingArguments, LoraModelConfig
from spectral_fast.training.original import LORA, in_our_words
from spectral_fast.training.ranks import RankAssignmentConfig
from spectral_fast.training.spline import SplineArguments

# Sections of the file; TRL's SFTConfig is one more.
SECTIONS: dict[str, type] = {
    "model": LoraModelConfig,
    "data": DataArguments,
    "ranks": RankAssignmentConfig,
    "slora": GateArguments,
    "spline": SplineArguments,
    "logging": LoggingArguments,
}
# What keys of a section begin with at the top of the file and as flags: seed is the training's.
PREFIXES = {"slora": "slora_"}
TRAINING = "training"
# The model is loaded before the trainer has it: these would be without effect.
_WITHOUT_EFFECT = ("model_init_kwargs", "disable_tqdm")
_RENAMED = {"group_by_length": "train_sampling_strategy: group_by_length", "max_seq_length": "max_length"}


@dataclass(frozen=True)
class Settings:
    """All that a training needs.

    Attributes:
        model: the base model and its adapter.
        training: TRL's SFTConfig.
        data: rows to train on.
        ranks: how ranks are assigned.
        slora: the gate, if there is one.
        spline: the learned activation after the adapter.
        logging: what is recorded.
    """

    model: LoraModelConfig
    training: Any
    data: DataArguments
    ranks: RankAssignmentConfig
    slora: GateArguments
    spline: SplineArguments
    logging: LoggingArguments

    def __post_init__(self) -> None:
        if Path(self.run_name).name != self.run_name:
            raise ValueError(f"run_name names a file of the run, and has no slashes; got {self.run_name!r}")
        if self.ranks.adaptive_ranks and not self.model.use_peft:
            raise ValueError("adaptive_ranks is for an adapter, and use_peft is off; leave out one of the two")
        if self.spline.use_spline and (self.model.use_dora or not self.model.use_peft):
            other = "use_dora is on" if self.model.use_dora else "use_peft is off"
            raise ValueError(f"use_spline is for an adapter of plain LoRA, and {other}; leave out one of the two")
        if self.training.packing and self.training.train_sampling_strategy == "group_by_length":
            raise ValueError("group_by_length and packing exclude each other: packed rows are all of one length")
        if self.training.max_steps > 0:
            self.slora.check_burn_in(self.training.max_steps * self.training.gradient_accumulation_steps, "max_steps")

    @property
    def run_name(self) -> str:
        """The name of the run: as given, or that of its folder."""
        return str(self.training.run_name or Path(self.training.output_dir).resolve().name)


def load(config: Path | str | None, flags: Mapping[str, Any] | None = None, words: Sequence[str] = ()) -> Settings:
    """Settings from a file and flags, of which the flags win.

    Args:
        config: YAML of keys and values, all at the top or each in its section (model, training, data, ranks, slora,
            spline, logging). Keys of slora begin with slora_ at the top; in the section they need not.
        flags: those of the classes in `SECTIONS`, parsed.
        words: the rest of the command line: fields of TRL's SFTConfig as flags.

    Returns:
        Everything that `train` needs, checked.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: TRL is not installed.
        ValueError, TypeError: an unknown key or flag, with what may be meant; a value that is not allowed.

    Example:
        >>> from pathlib import Path
        >>> from spectral_fast.training import Settings, load
        >>> _ = Path("train.yaml").write_text("{model_name_or_path: BASE, output_dir: trained, lora_r: 8}")
        >>> settings: Settings = load("train.yaml", {"lora_r": 16}, ["--max_steps", "10"])
        >>> settings.model.lora_r, settings.training.max_steps
        (16, 10)
    """
    given = {} if config is None else _read(Path(config))
    values = {key: value for key, value in given.items() if _owners()[key] != TRAINING} | dict(flags or {})
    gate = next((key for key in values if key.startswith(PREFIXES["slora"])), None)
    if gate is not None and "slora_enable" not in values:
        raise ValueError(f"{gate} is for a gate, and slora_enable is not said: turn it on, or off, or leave both out")
    values = PRESETS.get(str(values.get("spline_preset")), {}) | values
    parts: dict[str, Any] = {name: take(cls, values, PREFIXES.get(name, "")) for name, cls in SECTIONS.items()}
    sft = {key: value for key, value in given.items() if _owners()[key] == TRAINING}
    return Settings(training=_sft_config(sft, words), **parts)


def given_keys(config: Path | None, flags: Mapping[str, Any], words: Sequence[str] = ()) -> dict[str, Any]:
    """What `load` would be told, as keys of a file without sections.

    Args:
        config: as for `load`.
        flags: as for `load`.
        words: as for `load`.

    Raises:
        As `load`, except for what belongs together.
    """
    given = {} if config is None else _read(config)
    parser = _sft_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    said, unknown = parser.parse_known_args(words)
    _refuse(unknown)
    more: dict[str, Any] = vars(said)
    return given | {key: value for key, value in flags.items() if key in _owners()} | more


def training_defaults() -> dict[str, tuple[Any, str]]:
    """Key of section training -> default and what it is about, in TRL's words."""
    found = {}
    for f in fields(sft_config_class()):
        if _owners().get(f.name) == TRAINING:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            found[f.name] = (default, str(f.metadata.get("help", "")))
    return found


def sft_config_class() -> Any:
    """TRL's class.

    Raises:
        RuntimeError: TRL is not installed.
    """
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise RuntimeError("training needs TRL, which is not installed: pip install 'spectral-fast[train]'") from error
    return SFTConfig


@cache
def _owners() -> dict[str, str]:
    """Key -> section; where a class of ours and TRL's have the same, it is ours that counts."""
    sft = {f.name: TRAINING for f in fields(sft_config_class()) if f.init and f.name not in _WITHOUT_EFFECT}
    return sft | {PREFIXES.get(s, "") + f.name: s for s, cls in SECTIONS.items() for f in fields(cls)}


def _read(path: Path) -> dict[str, Any]:
    """Keys of a file, out of their sections."""
    from spectral_fast.yamlfile import read_yaml

    content = read_yaml(path)
    content = {} if content is None else content  # of comments alone, as --print_config prints where nothing is given
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values; got {type(content).__name__}")
    keys: dict[str, Any] = {}
    for key, value in content.items():
        inside = key in (*SECTIONS, TRAINING, LORA)
        if inside and not isinstance(value, dict):
            raise ValueError(f"{path}: section {key} must hold keys and values; got {value!r}")
        ours, others = in_our_words(key, value) if inside else ({}, {key: value})
        found = list(ours.items())
        for name, item in others.items():
            full = f"{PREFIXES.get(key, '')}{name}"
            full = full if full in _owners() else name
            owner = _owners().get(full)
            if owner is None:
                raise ValueError(f"{path}: unknown key {name!r}{_meant(str(name), _owners())}")
            if inside and owner != key:
                raise ValueError(f"{path}: {name} is a key of section {owner}, not of {key}")
            found.append((full, item))
        for name, item in found:
            if name in keys:
                raise ValueError(f"{path}: {name} stands there twice: in a section and outside, or by two names")
            keys[name] = item
    lists = {
        f.name for cls in SECTIONS.values() for f in fields(cls) if get_origin(get_type_hints(cls)[f.name]) is tuple
    }
    return {
        key: [value] if key in lists and isinstance(value, str) else value
        for key, value in keys.items()
        if value is not None or _owners()[key] == TRAINING
    }


def _sft_config(given: Mapping[str, Any], words: Sequence[str]) -> Any:
    """TRL's SFTConfig. Plain values of the file are read as the flags that they stand for, so that all are checked."""
    import torch

    cls, parser = sft_config_class(), _sft_parser()
    structured = {key: value for key, value in given.items() if value is None or isinstance(value, (list, dict))}
    hints = get_type_hints(cls)
    for key, value in structured.items():
        if value is not None and type(value).__name__ not in str(hints[key]):
            raise ValueError(f"{key} must be a plain value; got {value!r}")
    plain = [f"--{key}={value}" for key, value in given.items() if key not in structured]
    # TRL takes a GPU for granted.
    without_gpu = [] if torch.cuda.is_available() else ["--bf16=false", "--dataloader_pin_memory=false"]
    parsed, unknown = parser.parse_known_args([*without_gpu, *plain, *words], argparse.Namespace(**structured))
    values = vars(parsed)
    used = [name for name in _WITHOUT_EFFECT if values.pop(name) != cls.__dataclass_fields__[name].default]
    _refuse([*(f"--{name}" for name in used), *unknown])
    if values["output_dir"] is None:
        raise ValueError("no folder for the run: give output_dir, in the file or as a flag")
    return cls(**values, disable_tqdm=True)


def _sft_parser() -> Any:
    """A parser of the fields of TRL's SFTConfig."""
    from transformers import HfArgumentParser

    parser: Any = HfArgumentParser(sft_config_class(), allow_abbrev=False, add_help=False)

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse
    return parser


def _refuse(unknown: Sequence[str]) -> None:
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise ValueError(f"unknown flag {flag}{_meant(flag, [f'--{name}' for name in _owners()])}")


def _meant(name: str, known: Collection[str]) -> str:
    """A hint at the name that is known now, or the nearest one."""
    dashes = "--" if name.startswith("--") else ""
    renamed = _RENAMED.get(name.removeprefix("--"))
    return f"; is {dashes}{renamed} meant?" if renamed else nearest(name, known)

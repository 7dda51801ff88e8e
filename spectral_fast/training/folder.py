"""The folder of a run: checkpoints of the trainer, the record of the settings, the log."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spectral_fast.atomic import check_parents, replace_file
from spectral_fast.splines import SplineOptions
from spectral_fast.training.settings import Settings

PARAMETERS, FINAL, MONITORING = "training_params.json", "final_checkpoint", "system_monitoring"
LOG_HISTORY, GATE_METRICS = "log_history.json", "gate_metrics.json"
GATE_STATE = "gate.pt"  # in a checkpoint
_LAST_WRITTEN = "trainer_state.json"  # without it a checkpoint is what a killed run left of one
# What must not differ between a checkpoint and the run that goes on with it.
_RANKS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
_SPLINE = tuple(f.name for f in fields(SplineOptions))
_SAME = ("peft_type", *_RANKS, "use_dora", "use_rslora", "target_modules", "modules_to_save", *_SPLINE)
# Likewise of the settings: which rows come when, and the schedule, which the trainer takes from the checkpoint.
_SAME_TRAINING = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
)
_SAME_DATA = (
    *("train_dataset_path", "dataset_config", "train_split", "train_samples", "question_column", "answer_column"),
)


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and where it goes on.

    Attributes:
        path: `output_dir`.
        checkpoint: the folder of the trainer's to resume from; None for a run from the beginning.
    """

    path: Path
    checkpoint: Path | None

    @classmethod
    def of(cls, settings: Settings, overwrite: bool) -> RunFolder:
        """The folder that the settings name; nothing is changed yet.

        Raises:
            FileExistsError: it holds an earlier run, which is neither resumed nor to be replaced, or something else.
            FileNotFoundError: the checkpoint to resume from is not there.
            NotADirectoryError: it is a file.
            ValueError: no step is left to go on with, or the settings of the run that made the checkpoint are others.
        """
        path, wanted = Path(settings.training.output_dir), settings.training.resume_from_checkpoint
        check_parents(path)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"output_dir must be a folder, or nothing yet; {path} is a file")
        if wanted is not None and wanted.lower() != "false":
            checkpoint = _checkpoint(path, wanted)
            step = json.loads((checkpoint / _LAST_WRITTEN).read_text(encoding="utf-8"))["global_step"]
            if 0 < settings.training.max_steps <= step:  # the trainer would do one more
                raise ValueError(
                    f"{checkpoint} is at step {step} of max_steps = {settings.training.max_steps}: it is the end "
                    "already; take it as it is, or raise max_steps"
                )
            gated = (checkpoint / GATE_STATE).is_file()
            if gated != settings.slora.enable:
                held, now = ("a", "off") if gated else ("no", "on")
                raise ValueError(
                    f"{checkpoint} holds the state of {held} gate, and slora_enable is {now}; give the same"
                )
            _check_settings(checkpoint, settings)
            return cls(path, checkpoint)
        occupied = [*_checkpoints(path), *(path / name for name in (FINAL, PARAMETERS))]
        existing = next((file for file in occupied if file.exists()), None)
        if existing is not None and not overwrite:
            raise FileExistsError(
                f"{existing} is there from an earlier run: --overwrite it, go on with it by --resume_from_checkpoint "
                "latest, or choose another output_dir"
            )
        if existing is not None and not (path / PARAMETERS).is_file():
            raise FileExistsError(f"{path} is not overwritten: it has no {PARAMETERS}, so it is something else")
        return cls(path, None)

    def check(self, config: Any) -> None:
        """Refuse to go on with another adapter.

        Args:
            config: PEFT's, with the modules that the model has for it; None for a whole model.

        Raises:
            ValueError: naming what differs.
        """
        from peft import PeftConfig

        import spectral_fast.lslora  # noqa: F401  so that PEFT can read the configuration of one

        if self.checkpoint is None:
            return
        adapter = (self.checkpoint / "adapter_config.json").is_file()
        if adapter != (config is not None):
            held, peft = ("an adapter", "off") if adapter else ("a whole model", "on")
            raise ValueError(f"{self.checkpoint} holds {held}, and use_peft is {peft}; give the same")
        if config is None:
            return
        old = PeftConfig.from_pretrained(str(self.checkpoint))
        for name in _SAME:
            before, now = getattr(old, name, None), getattr(config, name, None)
            if before != now:
                told = [_told(value) for value in (before, now)]
                raise ValueError(f"{self.checkpoint} has {name} = {told[0]}, this run {told[1]}; give the same")

    def begin(self, settings: Settings) -> None:
        """Delete what a run that is replaced has left, and write the settings."""
        if self.checkpoint is None and (self.path / PARAMETERS).is_file():
            for old in (*_checkpoints(self.path), self.path / FINAL, self.path / MONITORING):
                if old.exists():
                    shutil.rmtree(old)
            for name in (LOG_HISTORY, GATE_METRICS):
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "loramodel_args": asdict(settings.model),
            "training_args": settings.training.to_dict(),  # without the user's tokens
            "data_args": {**asdict(settings.data), "log_file_path": str(self._log_file(settings))},
            "rank_assignment_args": asdict(settings.ranks),
            **({"gate_args": asdict(settings.slora)} if settings.slora.enable else {}),
            **({"spline_args": asdict(settings.spline)} if settings.spline.use_spline else {}),
        }
        replace_file(self.path / PARAMETERS, json.dumps(content, indent=4) + "\n")

    def end(self, entries: list[dict[str, Any]]) -> None:
        """Write what the trainer has logged, since before a resumption, too."""
        replace_file(self.path / LOG_HISTORY, json.dumps(entries) + "\n")

    @contextmanager
    def log(self, settings: Settings) -> Iterator[logging.Logger]:
        """A logger that writes to {run_name}.log, which a resumed run continues."""
        file = self._log_file(settings)
        handler = logging.FileHandler(file, mode="w" if self.checkpoint is None else "a", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger = logging.Logger("spectral_fast.training", logging.INFO)  # no child of the root, whose handlers print
        logger.addHandler(handler)
        try:
            yield logger
        finally:
            handler.close()

    def _log_file(self, settings: Settings) -> Path:
        return self.path / f"{settings.run_name}.log"


def _check_settings(checkpoint: Path, settings: Settings) -> None:
    """Refuse other rows or another schedule than those of the run that made the checkpoint, if its record is there."""
    record = checkpoint.parent / PARAMETERS
    if not record.is_file():
        return
    before = json.loads(record.read_text(encoding="utf-8"))
    now = {"training_args": settings.training.to_dict(), "data_args": asdict(settings.data)}
    for group, names in (("training_args", _SAME_TRAINING), ("data_args", _SAME_DATA)):
        for name in names:
            old, new = before.get(group, {}).get(name), now[group].get(name)
            if old != new:
                raise ValueError(f"{checkpoint} was made with {name} = {old}, this run has {new}; give the same")


def _told(value: Any) -> str:
    """A value of PEFT's configuration in words."""
    return str(sorted(value) if isinstance(value, set) else getattr(value, "value", value))[:80]


def _checkpoints(path: Path) -> list[Path]:
    """The trainer's, the oldest first."""
    found = {int(m[1]): p for p in path.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return [found[step] for step in sorted(found)]


def _checkpoint(path: Path, wanted: str) -> Path:
    """The one that is meant."""
    if wanted.lower() in ("true", "latest"):
        found = [folder for folder in _checkpoints(path) if (folder / _LAST_WRITTEN).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has no checkpoint to resume from; leave out resume_from_checkpoint")
        return found[-1]
    if not (Path(wanted) / _LAST_WRITTEN).is_file():
        raise FileNotFoundError(f"{wanted} is no whole checkpoint of a trainer: it has no {_LAST_WRITTEN}")
    return Path(wanted)

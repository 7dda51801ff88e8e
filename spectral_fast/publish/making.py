"""What the records in an adapter's folder say of how it was made: a text and a table per record."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from spectral_fast import edit
from spectral_fast.adapter.selection import SelectionOptions
from spectral_fast.calibration.options import CalibrationOptions
from spectral_fast.calibration.rows import GSM8K
from spectral_fast.policies import POLICIES
from spectral_fast.publish.paths import hub_name, without_paths
from spectral_fast.statistics import as_text
from spectral_fast.toolbox import clip, export, extraction, merging, prune, resize
from spectral_fast.toolbox.options import ClipOptions, PruneOptions, ResizeOptions
from spectral_fast.training.folder import FINAL, PARAMETERS
from spectral_fast.training.settings import SECTIONS

HUB_NAMES = {GSM8K: "openai/gsm8k", "humaneval": "openai/openai_humaneval"}  # data sets that have a short name here
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One step in the making of an adapter, for the card; `sources` are fingerprints of the adapters that went in."""

    title: str
    text: str
    facts: Mapping[str, str]
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


class Kind(NamedTuple):
    """A command that leaves a record; the settings of an edit depend on its mode."""

    title: str
    text: str
    tags: tuple[str, ...] = ()
    settings: type | None = None


_EDIT = (
    "By Spectral Surgery (Tian et al., [arXiv:2603.03995](https://arxiv.org/abs/2603.03995)), the singular values of "
    "the edited modules' ΔW = U diag(s) Vᵀ were reweighted; U and V are as before. Nothing was trained."
)
_PRUNE = "Some of every module's rank channels (a column of B with its row of A) were kept."
_RESIZE = "Some of every module's singular directions were kept."
_CLIP = "Singular values far above the median of their module were set to a limit."
_EXPORT = "The scalings were put into the factors, for loaders that know only one rank and one scaling."
_EXTRACT = "Every module's B A approximates the difference of a tuned model's weight and the base model's."
RECORDS = {
    edit.META: Kind("Spectral edit", _EDIT, ("spectral-editing",)),
    prune.META: Kind("Pruning", _PRUNE, ("pruned",), PruneOptions),
    resize.META: Kind("Resizing", _RESIZE, ("resized",), ResizeOptions),
    clip.META: Kind("Clipping", _CLIP, ("clipped",), ClipOptions),
    export.META: Kind("Export", _EXPORT),
    merging.META: Kind("Merging", "Several adapters became one.", ("merge",), merging.MergeOptions),
    extraction.META: Kind("Extraction", _EXTRACT, ("extracted",), extraction.ExtractOptions),
}
_BY_G = " What a direction gets depends on g = ∂L/∂s, measured on calibration samples."
_AT_RANDOM = " The directions were drawn at random: this is a control."
# Of TRL's settings, those that make the adapter what it is; the others are about the machine.
_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "optim", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "max_length", "packing"),
    *("completion_only_loss", "assistant_only_loss", "bf16", "fp16", "seed", "data_seed"),
)


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: it is none.
    """
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON object ({error}): mend it, or remove it") from error


def steps(folder: Path) -> list[Step]:
    """The steps of which an adapter's folder has records, the oldest first by the times of their files.

    The first is the training, if the folder is a checkpoint of `train`, whose settings stand beside it.

    Raises:
        ValueError: a record is broken, or lacks what every record of its kind has.
    """
    folder = folder.resolve()
    files = sorted((folder / name for name in RECORDS if (folder / name).is_file()), key=lambda x: x.stat().st_mtime_ns)
    settings = folder.parent / PARAMETERS
    if settings.is_file() and (folder.name == FINAL or re.fullmatch(r"checkpoint-\d+", folder.name)):
        files.insert(0, settings)
    found = []
    for file in files:
        record = without_paths(read_json(file))
        try:
            found.append(_trained(record) if file is settings else _made(RECORDS[file.name], record))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} is no record of spectral_fast ({type(error).__name__}: {error}): mend it, or remove it"
            ) from error
    return found


def counted(names: Iterable[str]) -> str:
    """Modules by the last component of their name."""
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return f"{kinds.total():,}: {', '.join(f'{kind} ({count})' for kind, count in kinds.items())}"


def _made(kind: Kind, record: Record) -> Step:
    meta = record["meta"]
    mode, probe, merged = meta.get("mode"), meta.get("probe") or {}, meta.get("sources") or []
    facts = {"mode": f"`{mode}`"} if mode else {}
    facts |= _figures(record["modules" if "modules" in record else "sigma_stats"])
    own = _values(POLICIES[mode] if mode else kind.settings, meta)
    for cls in (SelectionOptions, CalibrationOptions):
        own |= _changed(cls, {**probe, **meta})
    facts["settings"] = _listed(own)
    if probe:
        facts |= _calibration(probe)
    models = [f"{one['weight']:g} × `{one['lora_path']}` (sha256 `{one['adapter_sha256']}`)" for one in merged]
    models += [f"`{meta['lora_path']}` (sha256 `{meta['adapter_sha256']}`)"] if "adapter_sha256" in meta else []
    models += [f"`{meta['tuned_model']}` less `{meta['base_model']}`"] if "tuned_model" in meta else []
    facts["made from"] = " + ".join(models)
    facts["made with"] = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    data = HUB_NAMES.get(probe.get("calib_data", ""))
    return Step(
        kind.title,
        kind.text + _BY_G * bool(probe) + _AT_RANDOM * (mode == "random_index"),
        facts,
        (*kind.tags, *([mode] if mode else [])),
        (data,) if data else (),
        tuple(one["adapter_sha256"] for one in [*merged, meta] if "adapter_sha256" in one),
    )


def _figures(modules: Mapping[str, Record]) -> dict[str, str]:
    """What was done to the modules, over all of them."""
    stats = list(modules.values())
    found = {"modules": counted(modules)}

    def total(name: str) -> float:
        return sum(len(one[name]) if isinstance(one[name], list) else one[name] for one in stats)

    if stats and "sigma0_sum" in stats[0]:
        core, noise = ([one.get(f"{name}_eff", one.get(name)) for one in stats] for name in ("k_core", "k_noise"))
        found["directions"] = (
            f"{total('r'):,}, each by a step of its own"
            if None in core + noise
            else f"{sum(core):,} amplified, {sum(noise):,} suppressed, of {total('r'):,}"
        )
        found["sum of singular values"] = f"{total('sigma0_sum'):.6g} before, {total('sigma_new_sum'):.6g} after"
    if stats and "kept" in stats[0]:
        found["kept"] = f"{total('kept'):,} of {total('r'):,}"
    if stats and "clipped" in stats[0]:
        found["clipped"] = f"{total('clipped'):,} singular values"
    if errors := [one["error"] for one in stats if "error" in one]:
        found["relative error of ΔW"] = f"{fmean(errors):.2%} on average, {max(errors):.2%} at most"
    return found


def _calibration(probe: Record) -> dict[str, str]:
    sha256 = f", sha256 `{probe['calib_data_sha256']}`" if probe.get("calib_data_sha256") else ""
    facts = {
        "calibration": f"{probe['samples_used']:,} samples of `{probe['calib_data']}`{sha256} ({probe['tokens']:,} "
        f"tokens, {probe['labels']:,} of them labels)",
        "measured in": f"{probe['dtype']}, on {probe['device']}{', 4-bit base' if probe.get('load_in_4bit') else ''}",
    }
    if probe.get("stability"):
        facts["certainty of the choice"] = as_text(probe["stability"]).replace("\n", "; ")
    return facts


def _trained(record: Record) -> Step:
    sections = {"loramodel_args": "model", "data_args": "data", "rank_assignment_args": "ranks"}
    sections |= {"gate_args": "slora", "spline_args": "spline"}
    facts = {name: _listed(_changed(SECTIONS[name], record.get(entry, {}))) for entry, name in sections.items()}
    training = record["training_args"]
    facts["training"] = _listed({name: training[name] for name in _TRAINING if training.get(name) is not None})
    data = record["data_args"]["train_dataset_path"]
    name = HUB_NAMES.get(data, hub_name(data))
    tags = ("sft", "trl", *(("adaptive-ranks",) if record["rank_assignment_args"]["adaptive_ranks"] else ()))
    text = "Trained by TRL's SFTTrainer through `spectral-fast train`; settings that are not here are the defaults."
    return Step("Training", text, facts, tags, (name,) if name else ())


def _values(cls: type | None, record: Record) -> dict[str, Any]:
    """A record's settings of a class."""
    found = {} if cls is None else {f.name: record.get(f.name) for f in fields(cls)}
    return {name: value for name, value in found.items() if value is not None}


def _changed(cls: type, record: Record) -> dict[str, Any]:
    """Those that are not the defaults."""
    defaults = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(cls)}
    return {name: value for name, value in _values(cls, record).items() if value != defaults[name]}


def _listed(settings: Record) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())

"""What the records in an adapter's folder say of how it was made: a text, a table and a command per record."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from spectral_fast import edit
from spectral_fast.adapter.selection import SelectionOptions
from spectral_fast.calibration.rows import GSM8K
from spectral_fast.policies import POLICIES
from spectral_fast.publish.commands import command, measured, selected
from spectral_fast.publish.paths import hub_name, without_paths
from spectral_fast.statistics import as_text
from spectral_fast.toolbox import clip, export, extraction, merging, prune, resize
from spectral_fast.toolbox.options import ClipOptions, PruneOptions, ResizeOptions

HUB_NAMES = {GSM8K: "openai/gsm8k", "humaneval": "openai/openai_humaneval"}  # data sets that have a short name here
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """One step in the making of an adapter.

    Attributes:
        title: what it is called.
        text: what it does, in a sentence or two.
        facts: name -> value.
        commands: lines that repeat it.
        tags: for the card's metadata.
        datasets: names of the hub.
        sources: fingerprints of the adapters that went in.
    """

    title: str
    text: str
    facts: Mapping[str, str]
    commands: tuple[str, ...]
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def read_record(file: Path) -> Record:
    """A record without the paths of this machine; raises as `read_json`."""
    return dict(without_paths(read_json(file)))


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}): mend it, or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a JSON object; got {type(content).__name__}: mend it, or remove it")
    return content


def made_by(folder: Path) -> list[Made]:
    """The steps of which the folder has records, the oldest first by the times of their files.

    Raises:
        ValueError: a record is broken, or lacks what every record of its kind has.
    """
    found = [folder / name for name in RECORDS if (folder / name).is_file()]
    steps = []
    for file in sorted(found, key=lambda file: file.stat().st_mtime_ns):
        content, kind = read_record(file), RECORDS[file.name]
        try:
            step = kind.describe(content["meta"], content[kind.modules])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} is no record of spectral_fast ({type(error).__name__}: {error}): mend it, or remove it"
            ) from error
        # Modules that were chosen in Python are in no record, so no command would surely choose the same.
        known = not kind.selects or "target_modules" in content["meta"]
        steps.append(step if known else replace(step, commands=()))
    return steps


def _edit(meta: Record, modules: Record) -> Made:
    mode, probe, stats = str(meta["mode"]), meta.get("probe"), list(modules.values())
    policy, total = POLICIES[mode], sum(one["r"] for one in stats)
    facts = {"edited": _counted(modules), "mode": f"`{mode}`"}
    core, noise = ([one.get(f"{name}_eff", one.get(name)) for one in stats] for name in ("k_core", "k_noise"))
    if None in core + noise:
        facts["directions"] = f"{total:,}, each by a step of its own"
    else:
        up, down = sum(core), sum(noise)
        facts["directions"] = f"{up:,} amplified, {down:,} suppressed, {total - up - down:,} between, of {total:,}"
    before, after = (sum(one[name] for one in stats) for name in ("sigma0_sum", "sigma_new_sum"))
    facts["sum of singular values"] = f"{before:.6g} before, {after:.6g} after"
    facts["hyperparameters"] = _settings(meta, policy)
    again = {"lora_path": meta["lora_path"], "mode": mode, **selected(meta)}
    text = "The singular values of every edited module's ΔW = U diag(s) Vᵀ were reweighted; U and V are as before. "
    if probe:
        text += "What a direction gets depends on g = ∂L/∂s, measured on calibration samples. Nothing was trained."
        facts |= _calibration(probe)
        again = {"base_model": probe["base_model"], **again, **measured(probe)}
    else:
        random = "The directions were drawn at random: this is a control. " if mode == "random_index" else ""
        text += f"{random}Nothing was measured or trained."
    line = command("edit", "./edited", again, meta, policy, SelectionOptions)
    text += " Method: Tian et al., “Spectral Surgery”, arXiv:2603.03995."
    return Made(
        "Spectral edit", text, facts | _origin(meta), (line,), ("spectral-editing", mode), _data(probe), _of(meta)
    )


def _prune(meta: Record, modules: Record) -> Made:
    kept, total = sum(len(one["kept"]) for one in modules.values()), sum(one["r"] for one in modules.values())
    shares = [one["energy_kept"] for one in modules.values()]
    facts = {
        "pruned": _counted(modules),
        "channels": f"{kept:,} of {total:,} kept, {'the others left out' if meta['compact'] else 'the others zero'}",
        "share of the channels' energy kept": f"{fmean(shares):.1%} on average, {min(shares):.1%} at least",
        "hyperparameters": _settings(meta, PruneOptions),
    }
    again = {"lora_path": meta["lora_path"], **selected(meta), "compact": meta["compact"]}
    line = command("prune", "./pruned", again, meta, PruneOptions, SelectionOptions)
    text = "Of every module's rank channels (a column of B with its row of A) the best were kept. Nothing was trained."
    return Made("Pruning of rank channels", text, facts | _origin(meta), (line,), ("pruned",), (), _of(meta))


def _resize(meta: Record, modules: Record) -> Made:
    before, after = (sum(one[name] for one in modules.values()) for name in ("r", "kept"))
    facts = {
        "resized": _counted(modules),
        "directions": f"{after:,} of {before:,} kept",
        "error ‖ΔW − ΔW'‖ / ‖ΔW‖": _errors(one["error"] for one in modules.values()),
        "goal": _settings(meta, ResizeOptions),
    }
    probe, again = meta.get("probe"), {"lora_path": meta["lora_path"], **selected(meta)}
    lines = []
    if probe:
        facts |= _calibration(probe)
        to_probe = {"base_model": probe["base_model"], **again, **measured(probe)}
        lines.append(command("probe", "./probed", to_probe, meta, SelectionOptions))
        again["sensitivity"] = "./probed"
    lines.append(command("resize", "./resized", again, meta, ResizeOptions, SelectionOptions))
    text = "Every module was truncated to the singular directions that "
    text += "the loss on calibration samples depends on most." if probe else "are largest."
    return Made("Resizing", text, facts | _origin(meta), tuple(lines), ("resized",), _data(probe), _of(meta))


def _clip(meta: Record, modules: Record) -> Made:
    facts = {
        "clipped": f"{sum(len(one['clipped']) for one in modules.values()):,} singular values in {_counted(modules)}",
        "limit": f"{meta['multiple']:g} times the median of a module's singular values",
        "error ‖ΔW − ΔW'‖ / ‖ΔW‖": _errors(one["error"] for one in modules.values()),
    }
    again = {"lora_path": meta["lora_path"], **selected(meta)}
    line = command("clip", "./clipped", again, meta, ClipOptions, SelectionOptions)
    text = "Singular values far above the others of their module were set to a limit. Nothing was trained."
    return Made("Clipping of spikes", text, facts | _origin(meta), (line,), ("clipped",), (), _of(meta))


def _export(meta: Record, modules: Record) -> Made:
    facts = {
        "rank": f"{meta['rank']}, in {_counted(modules)}",
        "error ‖ΔW − ΔW'‖ / ‖ΔW‖": _errors(one["error"] for one in modules.values()),
    }
    again = {"lora_path": meta["lora_path"], "bake_scaling": True, "rank": meta["rank"]}
    line = command("export", "./exported", again, meta)
    text = "The scalings were put into the factors, for loaders that know only one rank and one scaling. But for "
    text += "rounding, ΔW is the same."
    return Made("Export with baked scaling", text, facts | _origin(meta), (line,), (), (), _of(meta))


def _merge(meta: Record, modules: Record) -> Made:
    names = meta["lora_path"] if isinstance(meta["lora_path"], list) else [x["lora_path"] for x in meta["sources"]]
    weights = [one["weight"] for one in meta["sources"]]
    sources = tuple(one["adapter_sha256"] for one in meta["sources"])
    facts = {
        "adapters": ", ".join(
            f"{weight:g} × `{name}` (sha256 `{sha[:16]}…`)"
            for weight, name, sha in zip(weights, names, sources, strict=True)
        ),
        "merged": _counted(modules),
        "error of the truncation ‖ΔW − ΔW'‖ / ‖ΔW‖": _errors(one["error"] for one in modules.values()),
        "settings": _settings(meta, merging.MergeOptions),
    }
    again = {"lora_path": names, "weights": weights, **selected(meta)}
    line = command("merge", "./merged", again, meta, merging.MergeOptions, SelectionOptions)
    text = f"{len(names)} adapters became one, by the method `{meta['method']}`. Nothing was trained."
    return Made("Merging", text, facts | _versions(meta), (line,), ("merge",), (), sources)


def _extract(meta: Record, modules: Record) -> Made:
    facts = {
        "base model": f"`{meta['base_model']}`",
        "tuned model": f"`{meta['tuned_model']}`",
        "extracted": _counted(modules),
        "error ‖ΔW − B A‖ / ‖ΔW‖": _errors(one["error"] for one in modules.values()),
        "settings": _settings(meta, extraction.ExtractOptions),
    }
    again = {name: meta[name] for name in ("base_model", "tuned_model", "target_modules", "modules_to_save")}
    line = command("extract", "./lora", again, meta, extraction.ExtractOptions)
    text = "Every module's B A approximates the difference of the tuned model's weight and the base's."
    return Made("Extraction", text, facts | _versions(meta), (line,), ("extracted",))


class Kind(NamedTuple):
    """How a record is read: the key of its modules, what describes them, and whether they were selected."""

    modules: str
    describe: Callable[[Record, Record], Made]
    selects: bool = True


RECORDS = {
    edit.META: Kind("sigma_stats", _edit),
    prune.META: Kind("modules", _prune),
    resize.META: Kind("modules", _resize),
    clip.META: Kind("modules", _clip),
    export.META: Kind("modules", _export, selects=False),
    merging.META: Kind("modules", _merge),
    extraction.META: Kind("modules", _extract),
}


def _calibration(probe: Record) -> dict[str, str]:
    data = f"{probe['samples_used']:,} samples of `{probe['calib_data']}`"
    data += f" ({probe['tokens']:,} tokens, {probe['labels']:,} of them labels)"
    hashes = {"file": probe.get("calib_data_sha256"), "tokens": probe.get("calib_tokens_sha256")}
    facts = {
        "calibration": data,
        "its sha256": ", ".join(f"{name} `{value[:16]}…`" for name, value in hashes.items() if value),
        "measured in": f"{probe['dtype']}, on {probe['device']}{', 4-bit base' if probe.get('load_in_4bit') else ''}",
    }
    if probe.get("stability"):
        facts["certainty of the choice"] = as_text(probe["stability"]).replace("\n", "; ")
    return facts


def _origin(meta: Record) -> dict[str, str]:
    """Where the adapter came from, and with what the step was made."""
    return {"from": f"`{meta['lora_path']}` (sha256 `{meta['adapter_sha256'][:16]}…`)", **_versions(meta)}


def _versions(meta: Record) -> dict[str, str]:
    return {"made with": ", ".join(f"{name} {version}" for name, version in meta["versions"].items())}


def _of(meta: Record) -> tuple[str, ...]:
    return (str(meta["adapter_sha256"]),)


def _data(probe: Record | None) -> tuple[str, ...]:
    name = probe and HUB_NAMES.get(probe["calib_data"], hub_name(probe["calib_data"]))
    return (name,) if name else ()


def _settings(meta: Record, options: type) -> str:
    values = {f.name: meta[f.name] for f in fields(options) if meta.get(f.name) is not None}
    return ", ".join(
        f"{name} = {f'{value:g}' if isinstance(value, float) else value}" for name, value in values.items()
    )


def _errors(values: Iterable[float]) -> str:
    found = list(values)
    return f"{fmean(found):.2%} on average, {max(found):.2%} at most" if found else "0"


def _counted(names: Iterable[str]) -> str:
    """Modules by the last component of their name."""
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return f"{kinds.total():,} modules: {', '.join(f'{kind} ({count})' for kind, count in kinds.items())}"

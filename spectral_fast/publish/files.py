"""Which files of an adapter's folder are published, and which are left out or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from spectral_fast.adapter import Adapter
from spectral_fast.adapter.folder import WEIGHTS, is_finite
from spectral_fast.adapter.naming import CONFIG
from spectral_fast.evaluation.evaluate import METRICS
from spectral_fast.publish.figures import CONFIGS
from spectral_fast.publish.paths import hub_name, without_paths
from spectral_fast.publish.records import RECORDS, read_json
from spectral_fast.publish.source_card import README

# Pattern of a name -> why it stays here.
LEFT_OUT = {
    ".*": "hidden",
    "__pycache__": "a cache",
    "*.partial": "unfinished",
    "*.unfinished": "unfinished",
    "checkpoint-*": "a trainer's checkpoint",
    **dict.fromkeys(
        (
            "optimizer.*",
            "scheduler.pt",
            "scaler.pt",
            "rng_state*",
            "trainer_state.json",
            "training_args.bin",
            "gate.pt",
        ),
        "a trainer's state",
    ),
    **dict.fromkeys(
        ("*predictions*.jsonl", "samples_*.jsonl", "raw_generations_*.jsonl", "*_results.jsonl", "per_problem_*.json"),
        "generations of an evaluation",
    ),
}
_RECORDS = (*RECORDS, CONFIGS, METRICS)


@dataclass(frozen=True)
class Content:
    """One file as it will be: its name there, its size in bytes, and where it is here, or its bytes if they change."""

    name: str
    size: int
    source: Path | bytes


def chosen(adapter: Adapter, base_model: str | None) -> tuple[list[Content], dict[str, str]]:
    """The files to publish, and those that are left out with the reason.

    Records go up without the paths of this machine, and so does adapter_config.json, which gets `base_model`.

    Raises:
        ValueError: a link leads out of the folder, something is not a plain file or has a name that is no text.
    """
    found, left = [], dict[str, str]()
    for path, name in _walk(adapter.path, adapter.path, left):
        if "/" not in name and name in WEIGHTS and name != adapter.weights.path.name:
            left[name] = f"{adapter.weights.path.name} is what is read"
            continue
        changed = _changed(path, name, base_model)
        found.append(Content(name, path.stat().st_size if changed is None else len(changed), changed or path))
    return sorted(found, key=lambda content: content.name), dict(sorted(left.items()))


def check_weights(adapter: Adapter) -> None:
    """Refuse weights that are empty, or not finite.

    Raises:
        ValueError: naming the first such tensor.
    """
    for name, tensor in adapter.weights.tensors.items():
        if tensor.nbytes == 0:
            raise ValueError(f"{adapter.weights.path}: {name} is empty; was it saved from shards? Save it whole first")
        values = adapter.weights.read(name)
        if values.dtype.is_floating_point and not is_finite(values):
            raise ValueError(f"{adapter.weights.path}: {name} has NaN or infinite values: mend the adapter first")


def _walk(folder: Path, root: Path, left: dict[str, str]) -> Iterator[tuple[Path, str]]:
    for entry in sorted(folder.iterdir()):
        name = entry.relative_to(root).as_posix()
        reason = next((why for pattern, why in LEFT_OUT.items() if fnmatch(entry.name, pattern)), None)
        if reason is not None:
            left[name] = reason
            continue
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the name {name!r} is no text that a repository can hold; rename the file") from error
        if entry.is_symlink():
            _check_link(entry, root)
        if name == README:
            left[name] = "replaced by the card, which quotes it"
        elif entry.is_dir():
            yield from _walk(entry, root, left)
        elif entry.is_file():
            yield entry, name
        else:
            raise ValueError(f"{entry} is no plain file; remove it from the folder before publishing")


def _check_link(link: Path, root: Path) -> None:
    """Links may lead to files of the folder and, in a snapshot of the hub's cache, to its blobs."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a circle is a RuntimeError before Python 3.13
        raise ValueError(f"{link} is a broken link; remove it from the folder before publishing") from error
    home = root.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if target.is_dir() or not (home in target.parents or blobs in target.parents):
        raise ValueError(
            f"{link} is a link to {target}, which is not in the folder: publish a copy in its place, or remove it"
        )


def _changed(path: Path, name: str, base_model: str | None) -> bytes | None:
    """The content to publish, if it is not the file's own."""
    if name == CONFIG:
        old = read_json(path)
        stated = old.get("base_model_name_or_path")
        new = {**old, "base_model_name_or_path": base_model or (stated if hub_name(stated) else without_paths(stated))}
    elif any(fnmatch(name, pattern) for pattern in _RECORDS):
        old = read_json(path)
        new = without_paths(old)
    else:
        return None
    return None if new == old else (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()


def unfinished(folder: Path) -> str | None:
    """The part of a folder's path that says that a run is still writing to it."""
    return next((part for part in folder.resolve().parts if fnmatch(part, "*.partial")), None)


def size_text(size: int) -> str:
    """Bytes for people."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def listing(contents: Sequence[Content], left: dict[str, str]) -> str:
    """Files and sizes, and what is left out, for people."""
    width = max((len(content.name) for content in contents), default=0)
    lines = [f"  {content.name:<{width}}  {size_text(content.size):>9}" for content in contents]
    return "\n".join([*lines, *(f"  left out: {name} ({why})" for name, why in left.items())])

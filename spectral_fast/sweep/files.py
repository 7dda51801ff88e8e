"""Files of configurations: JSON lines, or YAML; a list stands for a grid."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectral_fast.yamlfile import parse_yaml

SCALARS = (str, int, float, bool, type(None))
LISTS = ("target_modules", "eval_stop", "eval_stop_words")  # keys whose values are lists
MOST = 100_000  # configurations of a file


def read_configs(path: Path | str) -> list[tuple[str, dict[str, Any]]]:
    """(where, configuration) for each configuration of a file, with every grid expanded.

    A configuration is an object of keys and plain values. A list in place of a value stands for each of its
    items in turn, and several lists for all their combinations; `target_modules` and stop strings, which are
    lists themselves, are expanded where their items are lists.

    Args:
        path: .jsonl (one object per line), .yaml or .yml (one object, or a list of them).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, or broken, naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of configurations {path}")
    readers = {".jsonl": _json_lines, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix not in readers:
        raise ValueError(f"configurations are read from .jsonl, .yaml or .yml; got {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    configs: list[tuple[str, dict[str, Any]]] = []
    for where, given in readers[path.suffix](path, text):
        if not isinstance(given, dict):
            raise ValueError(f"{where}: a configuration is an object of keys and values; got {type(given).__name__}")
        configs += [(where, config) for config in _product(where, given)]
        if len(configs) > MOST:
            raise ValueError(f"{path} has more than {MOST:,} configurations, up to {where}; split it")
    if not configs:
        raise ValueError(f"{path} has no configurations")
    return configs


def _product(where: str, given: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    choices: dict[str, list[Any]] = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}: a key must be a name; got {key!r}")
        values = value if isinstance(value, list) else [value]
        lists = key in LISTS
        if lists and not any(isinstance(item, list) for item in values):
            values = [values]
        for item in values:
            if not isinstance(item, SCALARS) and not (
                lists and isinstance(item, list) and all(isinstance(i, SCALARS) for i in item)
            ):
                raise ValueError(f"{where}: {key} must be a value or a list of values; got {type(item).__name__}")
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: {key} is no text: {error}") from error
        if not values:
            raise ValueError(f"{where}: {key} is an empty list: a grid without points")
        choices[key] = values
    if math.prod(map(len, choices.values())) > MOST:
        raise ValueError(f"{where}: its lists have more than {MOST:,} combinations; split them")
    for point in itertools.product(*choices.values()):
        yield dict(zip(choices, point, strict=True))


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            given = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        yield where, given


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _yaml(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    content = parse_yaml(path, text)
    grids = content if isinstance(content, list) else [] if content is None else [content]
    for number, given in enumerate(grids, start=1):
        yield (path.name if len(grids) == 1 else f"{path.name} item {number}"), given

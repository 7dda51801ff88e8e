"""Read YAML written by people: a key stands only once, and 1e-4 is a number."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path, *, words: bool = False) -> Any:
    """What a file holds, read by the safe loader.

    Args:
        path: the file.
        words: leave numbers and dates the text that stands there.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: it is not UTF-8 or not YAML, naming the place.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        return parse_yaml(path, path.read_text(encoding="utf-8"), words=words)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def parse_yaml(path: Path, text: str, *, words: bool = False) -> Any:
    """As `read_yaml`, of a file whose text is known."""
    try:
        return yaml.load(text, Loader=_Words if words else _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML in which a key may stand only once, and 1e-4 is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        times = Counter(key.value for key in keys if key.tag != "tag:yaml.org,2002:merge")
        for key, count in times.items():
            if count > 1 and not getattr(node, "merged", False):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands there twice", node.start_mark)
        node.merged = True  # the keys of << are put before a node's own now, and may be the same
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Words(_Loader):
    """Of what is more than text only null, true and false are known."""


_Words.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in ("null", "bool", "merge")]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}

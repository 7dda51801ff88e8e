"""What may be published of the paths and names in records: names of the hub as they are, of a path `./` and its end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_WHOLE = re.compile(r"(/|~/|\.{1,2}/|file:/)|[^/\s]+(/[^/\s]+){2,}/?$")  # names of the hub have one slash at most
_WITHIN = re.compile(r"(?<![\w.~/<-])(?:file:/{0,2}(?=/))?~?(?:/[^/\s\"'`<>|(),;]+){2,}/?")
_DOWNLOAD = re.compile(r"/models--([^/]+)/snapshots/[0-9a-f]{40}/?$")  # in the hub's cache
_HOMES, _NOBODYS = {"~", "home", "root", "Users"}, {"bin", "dev", "etc", "usr"}
_FILES = (".jsonl", ".json", ".parquet", ".csv", ".txt")


def without_paths(value: Any) -> Any:
    """A record as it may be published: a path, however deep in it, becomes `./` and its last part.

    A download in the hub's cache goes by its name on the hub.

    Args:
        value: what JSON holds: texts, numbers, and lists and objects of them.
    """
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    # ORG/NAME may be a folder, which is what would be taken for it here.
    local = "/" in value and is_repo_id(value) and Path(value).exists()
    return _last_part(value) if "\n" not in value and (local or _WHOLE.match(value)) else text_without_paths(value)


def text_without_paths(text: str) -> str:
    """The same for paths within a text, where /api/v1 may be none: homes, and folders that this machine has.

    Those that every machine has, such as /usr, tell nothing. Addresses such as https://… are none.
    """

    def cleaned(match: re.Match[str]) -> str:
        first = match[0].removeprefix("file:").lstrip("/").partition("/")[0]
        private = first in _HOMES or (first not in _NOBODYS and Path("/", first).is_dir())
        return _last_part(match[0]) if private else match[0]

    return _WITHIN.sub(cleaned, text)


def hub_name(text: Any) -> str | None:
    """The text, if it is a name that the Hugging Face hub may have; None for paths, and for what is here under it."""
    if not isinstance(text, str) or text.lower().endswith(_FILES) or not is_repo_id(text):
        return None
    return None if Path(text).exists() else text


def is_repo_id(text: str) -> bool:
    """Whether the hub would take it as the name of a repository, with or without an owner."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except ValueError:
        return False
    return True


def _last_part(path: str) -> str:
    if download := _DOWNLOAD.search(path):
        return download[1].replace("--", "/")
    return f"./{Path(path).name.strip('~.') or 'path'}"

"""What may be published of the paths and names in records: names of the hub as they are, of a path its last part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LOCAL = " (local)"  # after the last part of a path, so that it is not taken for a name of the hub

_WHOLE = re.compile(r"(/|~/|\.{1,2}/|file:/)|[^/\s]+(/[^/\s]+){2,}/?$")  # names of the hub have one slash at most
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_WITHIN = re.compile(r"(?<![\w.~/<-])(?:file:/{0,2}(?=/))?~?(?:/[^/\s\"'`<>|(),;]+){2,}/?")
_DOWNLOAD = re.compile(r"/models--([^/]+)/snapshots/[0-9a-f]{40}/?$")  # in the hub's cache
_NOBODYS = {"bin", "dev", "etc", "lib", "lib64", "opt", "proc", "run", "sbin", "sys", "usr", "var"}
_FILE = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".yaml", ".yml", ".txt")


def without_paths(value: Any) -> Any:
    """A record as it may be published: of every path in it, however deep, only the last part is left.

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
    whole = "\n" not in value and (_WHOLE.match(value) or (_NAME.fullmatch(value) and Path(value).exists()))
    return _last_part(value) if whole else text_without_paths(value)


def text_without_paths(text: str) -> str:
    """The same for paths within a text; addresses such as https://… are none."""
    return _WITHIN.sub(lambda match: _last_part(match[0]), text)


def quoted_without_paths(text: str) -> str:
    """The same for a text of somebody else's, in which /api/v1 is no path: only folders that this machine has are.

    Those that every machine has, such as /usr, tell nothing.
    """

    def cleaned(match: re.Match[str]) -> str:
        path = match[0].removeprefix("file:").lstrip("/")
        first = path.partition("/")[0]
        ours = first == "~" or (first not in _NOBODYS and Path("/", first).is_dir())
        return _last_part(match[0]) if ours else match[0]

    return _WITHIN.sub(cleaned, text)


def hub_name(text: Any) -> str | None:
    """The text, if it is a name that the Hugging Face hub may have; None for paths, and for what is here under it."""
    if not isinstance(text, str) or text.lower().endswith(_FILE):
        return None
    try:
        return None if Path(check_repo_id(text)).exists() else text
    except ValueError:
        return None


def check_repo_id(repo_id: str) -> str:
    """A repository's name, as it is.

    Raises:
        ValueError: the hub would not take it.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id must be ORG/NAME, of letters, digits, '-', '_' and '.'; got {repo_id!r}") from error
    return repo_id


def in_command(text: Any) -> str:
    """A name of a record as an argument of a command: `./NAME` in place of a path."""
    return f"./{text.removesuffix(LOCAL)}" if isinstance(text, str) and text.endswith(LOCAL) else str(text)


def _last_part(path: str) -> str:
    if download := _DOWNLOAD.search(path):
        return download[1].replace("--", "/")
    return (Path(path).name.strip("~.") or "a path") + LOCAL

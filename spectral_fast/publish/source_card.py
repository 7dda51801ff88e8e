"""The card that an adapter's folder came with: its metadata and its text are kept, its figures are not ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectral_fast.adapter import Adapter
from spectral_fast.publish.paths import quoted_without_paths, without_paths

README = "README.md"
# Below our part of a card; with the hash, a folder that is published again does not quote its own card.
_MARK = "<!-- spectral_fast: the card above is of weights {} -->"
_MARKED = re.compile(_MARK.format("([0-9a-f]{64})") + r"\n*")
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_FIGURES = ("model-index", "metrics")  # of the source: an edited copy has others
_THEIR_NAMES = {"eval_results", "model_name"}  # of the same in ModelCardData
_INTRODUCTION = "*The card that came with the adapter's folder:*"
_UNFILLED = "[More Information Needed]"


@dataclass(frozen=True)
class SourceCard:
    """Metadata, text, and what to know of them.

    Attributes:
        metadata: of the front matter, without what is the source's alone.
        text: what follows it.
        warnings: for whoever publishes it.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, adapter: Adapter) -> SourceCard:
        """The card in an adapter's folder; an empty one if there is none.

        Raises:
            ValueError: its front matter is no metadata of a card.
        """
        file = adapter.path / README
        if not file.is_file():
            return cls()
        metadata, text = _parted(file)
        warnings = []
        if (mark := _MARKED.search(text)) and mark[1] == adapter.hashes[adapter.weights.path.name]:
            text = text[mark.end() :].removeprefix("---\n\n").removeprefix(f"{_INTRODUCTION}\n\n")
        if figures := [name for name in _FIGURES if name in metadata]:
            warnings.append(
                f"{README}: {' and '.join(figures)} of its metadata are left out, as they are of the source"
            )
        kept = {key: value for key, value in metadata.items() if key not in {*_FIGURES, *_THEIR_NAMES}}
        if isinstance(kept.get("tags"), list):
            kept["tags"] = [tag for tag in kept["tags"] if not _is_derived(tag)]
        if _UNFILLED in text:
            text = _without_blanks(text)
        return cls(without_paths(kept), quoted_without_paths(text).strip(), warnings)

    @property
    def base_model(self) -> Any:
        """As the metadata have it, if that is one."""
        base = self.metadata.get("base_model")
        return base[0] if isinstance(base, list) and len(base) == 1 else base

    def merged(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata with ours: lists are united, other values replaced."""
        merged = dict(self.metadata)
        for key, value in own.items():
            if isinstance(value, list):
                before = merged.get(key) or []
                before = before if isinstance(before, list) else [before]
                value = list(dict.fromkeys(str(x) for x in [*before, *value]))
            if value:
                merged[key] = value
        if not own.get("base_model"):
            for name in ("base_model", "base_model_relation"):
                merged.pop(name, None)
        return merged

    def below(self, hashes: Mapping[str, str]) -> str:
        """What comes after our card: a mark, and the text."""
        [weights] = [sha for name, sha in hashes.items() if not name.endswith(".json")]
        mark = f"\n{_MARK.format(weights)}\n"
        return f"{mark}\n---\n\n{_INTRODUCTION}\n\n{self.text}\n" if self.text else mark


def _parted(file: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text.

    Raises:
        ValueError: the front matter is no metadata of a card.
    """
    import yaml
    from huggingface_hub import ModelCardData

    content = file.read_bytes().decode("utf-8", "replace").lstrip("\ufeff")
    front = _FRONT.match(content)
    if front is None:
        return {}, content
    try:
        metadata = yaml.safe_load(front[1]) or {}
        ModelCardData(**metadata, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: what is between its two lines --- is no metadata ({reason}): mend it") from error
    return metadata, content[front.end() :]


def _is_derived(tag: Any) -> bool:
    """PEFT's `base_model:adapter:NAME`, which the hub makes of base_model by itself, and which may name a folder."""
    return isinstance(tag, str) and tag.startswith("base_model:")


def _without_blanks(text: str) -> str:
    """A card from the hub's form without the fields that nobody filled in, and the sections that are empty then."""
    from huggingface_hub.repocard import TEMPLATE_MODELCARD_PATH

    form = TEMPLATE_MODELCARD_PATH.read_text(encoding="utf-8")
    kept = [
        line
        for line in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).splitlines()
        if _UNFILLED not in line and (line.startswith("#") or not line.strip() or line.strip() not in form)
    ]
    sections: list[list[str]] = [[]]
    for line in kept:
        if line.startswith("#"):
            sections.append([])
        sections[-1].append(line)
    filled = [lines for lines in sections if any(line.strip() and not line.startswith("#") for line in lines)]
    return "\n".join(line for lines in filled for line in lines)

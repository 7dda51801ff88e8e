"""Markdown pages as stories: their commands, their Python, the files and the output that they show, in order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("spectral-fast", "make", "pip", "python", "python3", "torchrun", "git", "cd", "mergekit-yaml", "pytest")
SHELL = ("bash", "console", "sh", "shell")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`]*)$")
_FIRST_COMMENT = re.compile(r"^# (?P<file>[\w.-]+\.\w+)\b")
_TITLE = re.compile(r'title="(?P<file>[^"]+)"')
_ASSIGNMENT = re.compile(r"^[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page; `line` is where its text begins, `language` "" if nothing says."""

    language: str
    info: str
    text: str
    line: int
    fenced: bool

    @property
    def file(self) -> str | None:
        """The file that it shows: the fence's title, or the first word of a first comment of YAML or Jinja."""
        title = _TITLE.search(self.info)
        comment = _FIRST_COMMENT.match(self.text) if self.language in ("yaml", "toml") else None
        found = title or comment
        return found["file"] if found else None

    @property
    def commands(self) -> list[str]:
        """Its commands: all lines of a shell block, or of one without a language that begins with a program."""
        lines = logical_lines(self.text)
        if self.language in SHELL or (not self.language and any(program(line) for line in lines)):
            return lines
        return []


def blocks(markdown: str) -> Iterator[Block]:
    """All code blocks of a page, in order. An indented block follows a blank line, as Markdown has it."""
    lines = markdown.split("\n")
    number, blank, in_list = 0, True, False
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        start = number + 1
        if fence:
            indent = len(fence["indent"])
            number = next((i for i in range(start, len(lines)) if lines[i].strip() == "```"), len(lines))
            text = "\n".join(line[indent:] for line in lines[start:number])
            language, *_ = [*fence["info"].split(), ""]
            yield Block(language, fence["info"], text + "\n", start + 1, fenced=True)
        elif blank and not in_list and lines[number].startswith("    "):
            while number + 1 < len(lines) and (lines[number + 1].startswith("    ") or not lines[number + 1].strip()):
                number += 1
            text = "\n".join(line[4:] for line in lines[start - 1 : number + 1]).rstrip("\n")
            yield Block("", "", text + "\n", start, fenced=False)
        elif lines[number].strip():
            item = re.match(r"^\s*([-*]|\d+\.) ", lines[number])
            in_list = bool(item) or (in_list and lines[number].startswith(" "))
        blank = not lines[min(number, len(lines) - 1)].strip() or bool(fence)
        number += 1


def logical_lines(text: str) -> list[str]:
    """Command lines, those that end in a backslash joined, without prompts, comments and what stands after `# `."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [bare for line in lines if (bare := without_comment(line))]


def without_comment(line: str) -> str:
    """The line up to a `#` that opens a comment, which is one outside of quotes after a space."""
    quote = ""
    for i, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i].rstrip()
    return line.rstrip()


def program(line: str) -> str:
    """The program that a line calls, after assignments of environment variables; "" if it is none of PROGRAMS."""
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    while words and _ASSIGNMENT.match(words[0]):
        words.pop(0)
    return words[0] if len(words) > 1 and words[0] in PROGRAMS else ""


def inline_commands(markdown: str) -> list[str]:
    """Code spans in the text that call spectral-fast with flags, as `spectral-fast probe --stream`."""
    text = markdown
    for block in blocks(markdown):
        text = text.replace(block.text, "\n") if block.fenced else text
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return [span for span in spans if program(span) == "spectral-fast" and "--" in span]


def anchors(markdown: str) -> set[str]:
    """Names of a page's headings, as GitHub and MkDocs make them."""
    outside = markdown
    for block in blocks(markdown):
        outside = outside.replace(block.text, "\n") if block.fenced else outside
    names: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} (.+)$", outside, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(f"{name}-{names[name]}" if name in names else name)
        names[name] = names.get(name, 0) + 1
    return found


def links(markdown: str) -> list[str]:
    """Targets of links and pictures, those outside of this repository and those in code left out."""
    text = re.sub(r"`[^`\n]+`", "", markdown)
    for block in blocks(markdown):
        text = text.replace(block.text, "\n") if block.fenced else text
    found: Sequence[str] = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]


def broken_links(pages: Mapping[Path, str]) -> list[str]:
    """Relative links to files or headings that are not there."""
    wrong = []
    for page, markdown in pages.items():
        for target in links(markdown):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                wrong.append(f"{page.name}: {target}")
            elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
                wrong.append(f"{page.name}: {target} has no such heading")
    return wrong

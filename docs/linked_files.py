"""MkDocs hook: files outside of docs/ that pages link to, such as tables of results, come with the site.

On GitHub and in an editor such a link is relative, as ../benchmarks/results/gate.csv; on the site the file lies under
files/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"(\]\()((?:\.\./)+)([\w./-]+\.\w+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add what is linked to."""
    for page in list(files.documentation_pages()):
        for _, up, name in OUTSIDE.findall(page.content_string):
            if len(up) // 3 == page.src_uri.count("/") + 1 and files.get_file_from_path(f"files/{name}") is None:
                files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001
    """Turn the links to where the files lie."""
    depth = page.file.src_uri.count("/")

    def inside(match: re.Match[str]) -> str:
        up = len(match[2]) // 3
        return f"{match[1]}{'../' * depth}files/{match[3]}" if up == depth + 1 else match[0]

    return OUTSIDE.sub(inside, markdown)

"""The report's HTML: every text is escaped, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from spectral_fast._version import __version__
from spectral_fast.edit import EditedModule
from spectral_fast.report.drawing import Picture

CSS = """
:root { color-scheme: light; --line: #d8d8d8; --soft: #595959; }
* { box-sizing: border-box; }
body { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; background: #fff; color: #1c1c1c;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.15rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, footer { color: var(--soft); }
figure { margin: 0; }
figcaption { margin-top: .5rem; max-width: 46rem; font-size: .925rem; }
img { display: block; max-width: 100%; height: auto; }
.table { max-height: 34rem; overflow: auto; }
table { border-collapse: collapse; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { position: sticky; top: 0; background: #fff; font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 400; overflow-wrap: anywhere; min-width: 11rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
.flip { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid var(--line); }
.flip dt { color: var(--soft); font-size: .85rem; }
.flip dd { margin: 0 0 .5rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
footer { margin-top: 3rem; font-size: .85rem; }
"""


@dataclass(frozen=True)
class EvaluationRow:
    """One adapter's result.

    Attributes:
        adapter: what it is, e.g. "original" or "edited".
        accuracy: share of the problems solved, 0 to 1.
        standard_error: of the accuracy, same unit.
        difference: accuracy less the original's on the same problems; None for the original.
        interval: 95% confidence interval of the difference.
        p_value: of the paired test that there is no difference.
    """

    adapter: str
    accuracy: float
    standard_error: float
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None


def page(
    title: str,
    edited: Mapping[str, EditedModule],
    pictures: Sequence[Picture],
    evaluation: Sequence[EvaluationRow],
    facts: Mapping[str, Any],
) -> str:
    """The whole document."""
    values = sum(module.s.numel() for module in edited.values())
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Edit of {values:,} singular values in {len(edited):,} modules.</p>',
    ]
    if evaluation:
        parts += ["<h2>Evaluation</h2>", _evaluation(evaluation)]
    parts += [figure(picture) for picture in pictures]
    if any(module.g is None for module in edited.values()):
        parts.append('<p class="soft">This edit used no sensitivities, so there are no pictures of them.</p>')
    if facts:
        rows = [[name, _text(value)] for name, value in facts.items()]
        parts += ["<h2>Facts</h2>", table("Facts", ["name", "value"], rows, numbers=False)]
    parts += ["<h2>Modules</h2>", _modules(edited)]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole document of these parts, each HTML."""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Made by spectral_fast {escape(__version__)}.</footer>
</body>
</html>
"""


def figure(picture: Picture) -> str:
    """A picture with its heading and caption."""
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f"<h2>{escape(picture.title)}</h2>\n"
        f'<figure><img width="{100 * picture.width:.0f}" alt="{escape(picture.title)}" '
        f'src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _evaluation(rows: Sequence[EvaluationRow]) -> str:
    def cells(row: EvaluationRow) -> list[str]:
        difference = "–" if row.difference is None else f"{100 * row.difference:+.2f}"
        interval = "–" if row.interval is None else " to ".join(f"{100 * end:+.2f}" for end in row.interval)
        p = "–" if row.p_value is None else f"{row.p_value:.3f}" if row.p_value >= 0.001 else "< 0.001"
        return [row.adapter, f"{row.accuracy:.2%}", f"{row.standard_error:.2%}", difference, interval, p]

    head = ["adapter", "accuracy", "standard error", "difference (points)", "95% interval", "p"]
    return table("Evaluation", head, map(cells, rows))


def _modules(edited: Mapping[str, EditedModule]) -> str:
    def cells(name: str, module: EditedModule) -> list[str]:
        pair = module.s, module.edit.s_new
        g = module.g
        return [
            name,
            str(module.s.numel()),
            *(f"{s.sum().item():.4g}" for s in pair),
            *(f"{max(s.tolist(), default=0.0):.4g}" for s in pair),
            str(int(module.edit.core.sum())),
            str(int(module.edit.noise.sum())),
            "–" if g is None or not g.numel() else f"{g.abs().mean().item():.3g}",
        ]

    head = ["module", "r", "sum s", "sum s′", "largest s", "largest s′", "core", "noise", "mean |g|"]
    return table("Modules", head, (cells(name, module) for name, module in edited.items()))


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table that scrolls if it must; the first column heads the rows."""
    kind = ' class="number"' if numbers else ""

    def line(tag: str, first: str, rest: Sequence[str]) -> str:
        return f"<tr>{first}" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell in rest) + "</tr>"

    titles = line("th", f"<th>{escape(head[0])}</th>", head[1:])
    body = "\n".join(line("td", f'<th scope="row">{escape(row[0])}</th>', row[1:]) for row in rows)
    return (
        f'<div class="table" role="region" aria-label="{name}" tabindex="0"><table>\n'
        f"<thead>{titles}</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _text(value: Any) -> str:
    """A fact for a reader, without the punctuation of Python."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return str(value)

"""Pieces of an HTML page: everything that is text is escaped, everything that is an image is inside."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NewType

from ..tables import Table

#: Text that is HTML already.
Html = NewType("Html", str)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c1e21; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #d7dade; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e6e8eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: #f3f4f6; }
img { max-width: 100%; } .pixels { width: 84px; height: 84px; object-fit: contain; image-rendering: pixelated; }
.gallery td, .gallery th { text-align: center; vertical-align: top; } .fooled { color: #b42318; font-weight: 600; }
.warning { color: #8a4b00; } .note { color: #555b63; } details { margin: .5rem 0; }
pre { background: #f3f4f6; padding: .7rem; overflow-x: auto; white-space: pre-wrap; }
"""


def text(value: object) -> Html:
    """The text of ``value``, escaped for a page or an attribute."""
    return Html(html.escape(str(value), quote=True))


def joined(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


def tag(name: str, content: Html, kind: str = "") -> Html:
    """An element, of a class if ``kind`` is given."""
    attribute = f' class="{text(kind)}"' if kind else ""
    return Html(f"<{name}{attribute}>{content}</{name}>")


def paragraph(words: str, kind: str = "") -> Html:
    return tag("p", text(words), kind)


def items(lines: Sequence[str]) -> Html:
    """A list; a line that begins with ! is a warning."""
    made = [tag("li", text(line), "warning" if line.startswith("!") else "") for line in lines]
    return tag("ul", joined(made)) if made else Html("")


def table(rows: Table) -> Html:
    """A table of texts, the header first."""
    return html_table([[text(cell) for cell in row] for row in rows])


def html_table(rows: Sequence[Sequence[Html]], kind: str = "") -> Html:
    lines = []
    for number, row in enumerate(rows):
        cells = joined([tag("td" if number else "th", cell) for cell in row])
        lines.append(tag("tr", cells))
    return Html(f'<div class="wide">{tag("table", joined(lines), kind)}</div>')


def image(data: bytes, what: str, kind: str = "") -> Html:
    """A PNG, inside the page; ``what`` is said where it cannot be seen."""
    encoded = base64.b64encode(data).decode()
    return Html(f'<img class="{text(kind)}" alt="{text(what)}" src="data:image/png;base64,{encoded}">')


def folded(title: str, content: Html) -> Html:
    """What is shown after a click."""
    return tag("details", joined([tag("summary", text(title)), content]))


def values(of: Mapping[str, Any]) -> Html:
    """Settings as JSON."""
    return tag("pre", text(json.dumps(of, indent=2, default=str)))


def section(title: str, *parts: Html) -> Html:
    return joined([tag("h2", text(title)), *parts])


def document(title: str, body: Html) -> Html:
    """The whole page. Its policy lets a browser load nothing and run nothing."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{text(title)}</title>\n'
        f"<style>{_STYLE}</style>"
    )
    return Html(f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n')

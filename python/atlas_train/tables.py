"""Tables as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Table = Sequence[Sequence[str]]  # the header first; all rows as long as it


def aligned(table: Table) -> str:
    """The table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def markdown(table: Table) -> str:
    """The table as markdown, aligned in the same way."""
    rows = [table[0], ["---", *["---:"] * (len(table[0]) - 1)], *table[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def latex(table: Table) -> str:
    """The table for LaTeX, aligned in the same way, with the rules of booktabs."""
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in table]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])


Form = Literal["text", "markdown", "latex"]
_FORMS: Mapping[Form, Callable[[Table], str]] = {"text": aligned, "markdown": markdown, "latex": latex}


def written(table: Table, form: Form = "text", remarks: Sequence[str] = ()) -> str:
    """The table in that form, and the lines below it: in LaTeX comments, in markdown paragraphs."""
    if form == "latex":
        lines = [f"% {line}" for line in remarks]
    else:
        lines = [line for text in remarks for line in ("", text)] if form == "markdown" else list(remarks)
    return "\n".join([_FORMS[form](table), *lines])


def _escaped(cell: str) -> str:
    """The characters that mean something to LaTeX, as themselves; norms as papers write them."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    text = "".join(words.get(c, rf"\{c}" if c in "&%$#_{}" else c) for c in cell)
    for norm, sign in {r"(l\_inf)": r"($\ell_\infty$)", "(l2)": r"($\ell_2$)", "(l1)": r"($\ell_1$)"}.items():
        text = text.replace(norm, sign)
    return text

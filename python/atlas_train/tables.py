"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence

Table = Sequence[Sequence[str]]  # the header first; all rows as long as it


def aligned(table: Table) -> str:
    """The table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def markdown(table: Table) -> str:
    """The table as markdown, aligned in the same way."""
    rows = [table[0], ["---", *["---:"] * (len(table[0]) - 1)], *table[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

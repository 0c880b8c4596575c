"""Fills the marked blocks of docs/performance.md from benchmarks/results and docs/figures: no number there is typed.

    python benchmarks/performance_page.py

A block names what it holds: ``<!-- begin: FILE*.md -->``, all that these scripts wrote; ``<!-- begin: FILE.md: HEADING
-->``, one table of it and the command that made it; ``<!-- begin: FILE.png -->``, a figure.
"""

from __future__ import annotations

import re
from pathlib import Path

from atlas_train.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- begin: ([^\n:]+?)(?:: ([^\n]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path, figures: Path) -> str:
    """The page with every block as its file is now; a file that is not there is said to be missing."""

    def content(found: re.Match[str]) -> str:
        begin, name, heading, end = found.groups()
        paths = sorted((figures if name.endswith(".png") else results).glob(name))
        said: set[str] = set()
        made = [_figure(path) if path.suffix == ".png" else _table(path, heading, said) for path in paths]
        inside = "\n\n".join(made or [f"(Not measured yet: there is no `{name}`.)"])
        return f"{begin}\n{inside}\n\n{end}"

    return BLOCK.sub(content, text)


def _figure(path: Path) -> str:
    return f"![{path.stem}]({path.parent.name}/{path.name})"


def _table(path: Path, heading: str | None, said: set[str]) -> str:
    """The file with its headings two levels down, or one table of it. Raises ValueError where that is not there.

    A whole file leaves out notes that are ``said`` before in the block and adds its own; its two last parts, command
    and machine, stay.
    """
    parts = path.read_text(encoding="utf-8").strip().split("\n\n")
    if heading is None:
        new = [part for part in parts[:-2] if part not in said] + parts[-2:]
        said.update(part for part in new if part[0].isalpha())
        return "\n\n".join(f"##{part}" if part.startswith("#") else part for part in new)
    if f"## {heading}" not in parts:
        known = ", ".join(repr(part[3:]) for part in parts if part.startswith("## "))
        raise ValueError(f"{path.name} has no table {heading!r} (it has {known})")
    table = parts[parts.index(f"## {heading}") + 1]
    command = next((part for part in parts if part.startswith("`")), None)
    return "\n\n".join([f"{heading}:", table, *([] if command is None else [f"Printed by {command}."])])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, filled(text, RESULTS, PAGE.parent / "figures"))
    missing = re.findall(r"there is no `(.*?)`", PAGE.read_text(encoding="utf-8"))
    print(f"{PAGE} is filled" + (f"; missing: {', '.join(missing)}" if missing else ""))


if __name__ == "__main__":
    main()

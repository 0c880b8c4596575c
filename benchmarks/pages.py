"""Fills the marked blocks of README.md and docs from the code and from benchmarks/results: no number there is typed.

    python benchmarks/pages.py

A block names what it holds: ``<!-- begin: FILE*.md -->``, all that these scripts wrote; ``<!-- begin: FILE.md: HEADING
-->``, one table of it and the command that made it; ``<!-- begin: FILE.png -->``, a figure; or a table of ``MADE``.
docs/one_step.md and docs/atlas_study.md have scripts of their own, one_step_page.py and studies/atlas.py.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

from atlas_train import data, methods, models
from atlas_train.cli import default_text, defaults_by_data_set
from atlas_train.options import allowed, hints
from atlas_train.passes import count_passes
from atlas_train.writing import write_text
from harness import Row
from one_step_page import Row as MethodRow
from one_step_page import Steps
from tables import markdown

ROOT = Path(__file__).resolve().parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
_FILLED = ("evaluation", "methods", "operators", "performance", "results")
PAGES = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in _FILLED))
BLOCK = re.compile(r"(<!-- begin: ([^\n:]+?)(?:: ([^\n]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)
#: Where the table of methods takes their defaults from.
DATASET = "cifar10"


def filled(text: str, page: Path, results: Path = RESULTS, figures: Path = DOCS / "figures") -> str:
    """The text of the page with every block as its source is now; a file that is not there is said to be missing."""

    def content(found: re.Match[str]) -> str:
        begin, name, heading, end = found.groups()
        if name in MADE:
            return f"{begin}\n{MADE[name](results)}\n\n{end}"
        paths = sorted((figures if name.endswith(".png") else results).glob(name))
        said: set[str] = set()
        made = [_figure(path, page) if path.suffix == ".png" else _table(path, heading, said) for path in paths]
        inside = "\n\n".join(made or [f"(Not measured yet: there is no `{name}`.)"])
        return f"{begin}\n{inside}\n\n{end}"

    return BLOCK.sub(content, text)


def _figure(path: Path, page: Path) -> str:
    return f"![{path.stem}]({path.relative_to(page.parent).as_posix()})"


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


# --- tables that are made from the code


def methods_table(results: Path) -> str:
    """Every method with its source, and its passes as counted with its defaults on ``DATASET``."""
    lines = [["method", "what it is", "passes a step"]]
    for name in methods.names():
        lines.append([f"`{name}`", _title(methods.get(name)), f"{_passes(name):.0f}"])
    return markdown(lines)


def _passes(name: str) -> float:
    """Of a step with the method's defaults on ``DATASET``, after a few others."""
    model = models.build("preact_resnet18", num_classes=10, in_channels=3, width=4, normalize=False)
    row = MethodRow(name, name, methods.defaults_on(data.get(DATASET), name))
    *_, last = (count_passes(model, steps.batch.x, step) for steps in [Steps(row, model, 10, 16)] for step in steps)
    return last


def _title(method: type) -> str:
    """How a docstring begins: up to the end of its first bracket, which names the source, else up to its colon."""
    sentence = " ".join((inspect.getdoc(method) or "").split()).replace("``", "`")
    found = re.match(r"[^:(]*[^:( ]( \([^)]*\))?", sentence)
    return found[0] if found else sentence


def methods_reference(results: Path) -> str:
    """What `atlas methods` prints, as a section for each method."""
    sections = []
    for name in methods.names():
        method = methods.get(name)
        settings = [["hyper-parameter", "default", "allowed", "what it is"]]
        known = methods.hyper_parameters(method)
        for key, field in known.items():
            cells = (
                f"`{key}`",
                default_text(field.default),
                allowed(field, hints(method)[key]),
                field.metadata["help"],
            )
            settings.append([cell.replace("|", r"\|") for cell in cells])
        parts = [f"### {name}", f"```text\n{inspect.getdoc(method)}\n```", *([markdown(settings)] if known else [])]
        parts += [f"On {where}: {values}." for where, values in defaults_by_data_set(name)]
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


def operator_speed(results: Path) -> str:
    """The rows of `pytest --benchmark-only` on a CPU."""
    lines = [["operator", "size", "ours, us", "floor, us", "plain PyTorch / ours", "torch.compile / ours"]]
    for values in json.loads((results / "cpu.json").read_text(encoding="utf-8"))["rows"]:
        op, size, ours, _, floor, _, plain, compiled, _ = Row(**values).table_line()
        lines.append([op, size, ours, floor, plain, compiled])
    return markdown(lines)


MADE: dict[str, Callable[[Path], str]] = {
    "methods": methods_table,
    "methods-reference": methods_reference,
    "operator-speed": operator_speed,
}


def main() -> None:
    for page in PAGES:
        write_text(page, filled(page.read_text(encoding="utf-8"), page))
        missing = re.findall(r"there is no `(.*?)`", page.read_text(encoding="utf-8"))
        print(f"{page} is filled" + (f"; missing: {', '.join(missing)}" if missing else ""))


if __name__ == "__main__":
    main()

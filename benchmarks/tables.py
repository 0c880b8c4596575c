"""What a script here leaves behind: a table on the terminal, and beside its JSON the same as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas_train.tables import Table as Table
from atlas_train.tables import aligned as aligned
from atlas_train.tables import markdown as markdown
from atlas_train.writing import write_json, write_text
from harness import environment

#: Options whose values say where things are on this machine, and nothing about the results.
PLACES = ("--data-dir", "--results", "--plots", "--checkpoint")


def command_line(script: str, arguments: Sequence[str]) -> str:
    """The command as somebody else would type it: what names a folder of this machine is left to them."""
    shown: list[str] = []
    for word in arguments:
        option, equals, _ = word.partition("=")
        if shown and shown[-1] in PLACES:
            word = shown[-1].strip("-").upper()
        elif equals and option in PLACES:
            word = f"{option}={option.strip('-').upper()}"
        shown.append(word)
    return " ".join(["python", f"benchmarks/{Path(script).name}", *shown])


def write(path: Path, title: str, command: str, values: Mapping[str, Any], parts: Sequence[str]) -> None:
    """``values`` with environment and command as JSON in ``path``, ``parts`` beside it as markdown; each whole."""
    machine = environment()
    write_json(path, {"command": command, "environment": machine, **values})
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    write_text(path.with_suffix(".md"), "\n\n".join([f"# {title}", *parts, f"`{command}`", f"{facts}."]) + "\n")

"""What `atlas evaluate` says when it ends, or is stopped: which files there are, and what can be done next."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..options import plain

#: A name, or None where none was asked for; what the file holds; what writes it.
File = tuple[str | None, str, Callable[[Path], object]]


def write(files: Sequence[File]) -> list[str]:
    """Writes those that were asked for; a line about each."""
    lines = []
    for name, what, make in files:
        if name:
            make(Path(name))
            lines.append(f"wrote {plain(name)}: {what}")
    return lines


def next_steps(lines: Sequence[str], whole: bool, state: str | None) -> list[str]:
    """What may be done after an evaluation. lines: about the files that it wrote; whole: whether AutoAttack ran."""
    steps = []
    if not lines:
        steps.append("nothing was written; --json FILE keeps the figures")
    if not whole:
        steps.append(
            "for a figure to publish: --attacks fgsm pgd-20 autoattack --state FILE, and --size for all test images "
            "(see docs/evaluation.md)"
        )
    if state and states(state):
        steps.append(
            f"{_named(state)} may be removed: the attacks are done, and the same command would only judge again"
        )
    return [f"next: {step}" if not number else f"      {step}" for number, step in enumerate(steps)]


def how_to_go_on(state: str | None, searched: bool) -> str:
    """After a stop. searched: whether AutoAttack, or a part of it, was to run."""
    if state and states(state):
        return f"where the attack stands is in {_named(state)}: the same command goes on from there"
    if state and searched:
        return f"nothing is kept of it: it was stopped before an attack wrote {plain(state)}"
    return "nothing is kept of it; with --state FILE the same command would go on where it was stopped" * searched


def states(state: str) -> list[Path]:
    """The files of a state: of several attacks, radii, epochs or processes each has its own."""
    path = Path(state)
    name = re.compile(re.escape(path.name) + r"(\.best)?(\.[a-z-]+-\d[\d.e+-]*)?(\.\d+-of-\d+)?")
    return sorted(each for each in path.parent.glob("*") if name.fullmatch(each.name))


def _named(state: str) -> str:
    found = states(state)
    return plain(found[0]) if len(found) == 1 else f"{plain(state)}.* ({len(found)} files)"

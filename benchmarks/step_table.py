"""The table of whole training steps: what was measured of each, how it is said, and how it is written."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import environment, median_interval
from tables import Table, markdown, write

#: Between the losses of ours and of the published step in fp32. Sums in another order turn the signs of gradients that
#: are all but zero: most rows agree to 1e-4, TRADES, whose KL begins without a gradient, to a few 1e-3 and sometimes
#: not even that. Then ours has to give the loss that the published step gives in double precision.
TOLERANCE = 5e-3

NOTES = (
    "Medians in ms; one process, contenders in turn; the same weights, images, noise and settings on both sides; SGD "
    "with momentum at a learning rate of 0 in effect, so that every round is the same step.",
    "published: the published code's way in plain PyTorch, fp32, contiguous NCHW, with all that it runs (weight "
    "gradients in attacks, forwards for logs), its starting noise handed to it; for atlas our own documentation of it. "
    "ours: the trainer's step in channels_last under keep_memory, bf16 by autocast in attack and training.",
    "F: passes of the network, 1 a forward, 1 a backward to the input, 1 a backward to the weights. Ours leaves out "
    "passes whose only effect is on BatchNorm's running statistics (bn_compat makes them).",
    "x: published / ours. network: share of ours that its passes take when nothing but them is run, of the same dtype, "
    "layout, modes and widths. Both are medians over rounds of quotients of one round, with the interval of the order "
    "statistics around them, which holds the true median with a probability of 75% for 3 rounds, 88% for 4, 94% for 5 "
    "and 95% or more from 6 on. MiB: the most that torch holds at once in a step beyond weights, momentum and images.",
    f"A row has times only if ours in fp32 and the published step gave the same loss, to {TOLERANCE:g} of it, in a "
    "step without TF32; times and memory are in PyTorch's default, on CUDA TF32 in convolutions. *: the published step "
    "gave it in double precision; in fp32 it is further from that, for rounding decides the signs of gradients that "
    "are all but zero.",
)
#: Of ours and its passes: torch.compile of the network, CUDA graphs of whole steps, both. A longer name comes first.
KINDS = (" compiled graphs", " compiled", " graphs")
HEADER = (
    "step", "published ms", "F", "ours fp32 ms", "x", "ours bf16 ms", "x", "F", "network fp32", "network bf16",
    "MiB published", "ours fp32", "ours bf16", "rounds",
)  # fmt: skip


@dataclass
class StepRow:
    """A method's step: passes and bytes by contender, seconds of every round, losses where they are to be the same.

    doubles: the same losses in double precision, where those in fp32 differ. problem: why there are no times. missing:
    why there are none of a kind. command, commit: what measured it.

    Contenders: "published" (or "published NAME" for each of several), "ours fp32", "ours bf16", "bare fp32", "bare
    bf16", and the last four with one of ``KINDS``.
    """

    step: str
    losses: dict[str, float] = field(default_factory=dict)
    doubles: dict[str, float] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    problem: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
    command: str = ""
    commit: str = ""

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> StepRow:
        """The row that ``report`` wrote."""
        return cls(**{name: value for name, value in written.items() if name != "published"})

    @property
    def published(self) -> list[str]:
        return [name for name in self.losses if name.startswith("published")]

    @property
    def differing(self) -> list[str]:
        """The published ways from whose loss that of ours differs, in fp32."""
        return [name for name in self.published if not self._same(self.losses[name])]

    def _same(self, loss: float) -> bool:
        return abs(self.losses["ours fp32"] - loss) <= TOLERANCE * abs(loss)

    def look_for_problems(self) -> None:
        """Sets ``problem`` where a loss differs from the published one, or the bare passes from those of ours."""
        for name in self.differing:
            if not (math.isfinite(self.losses[name]) and self._same(self.doubles[name])):
                self.problem = f"loss {self.losses['ours fp32']:.6g}, {name} {self.losses[name]:.6g}: no times"
        ours, bare = self.passes["ours"], self.passes["bare"]
        if abs(bare - ours) > 0.02 * ours:
            raise ValueError(
                f"{self.step}: the bare loop makes {bare:.2f} passes and ours {ours:.2f}: correct its row in steps.py"
            )

    def lines(self) -> list[list[str]]:
        """A line for each published way, and one for each other kind of ours."""
        if self.problem:
            return [[f"{self.step}: {self.problem}"]]
        lines = [self._line(name, "") for name in self.published]
        kinds = [kind for kind in KINDS if {f"ours fp32{kind}", f"ours bf16{kind}"} & self.seconds.keys()]
        lines += [self._line(self.published[0], kind) for kind in kinds]
        return lines + [[f"{self.step}{kind}: {reason}"] for kind, reason in self.missing.items()]

    def _line(self, published: str, kind: str) -> list[str]:
        project = published.removeprefix("published").strip()
        label = self.step + (f" ({project})" if project else "") + ("*" if published in self.differing else "")
        times, shares = [], []
        for dtype in ("fp32", "bf16"):
            ours = f"ours {dtype}{kind}"
            if ours not in self.seconds:  # compiled in the other dtype alone
                times, shares = [*times, "-", "-"], [*shares, "-"]
                continue
            times += [self._ms(ours), self._quotient(published, ours, ".2f")]
            shares.append(self._quotient(f"bare {dtype}{kind}", ours, ".1%"))
        memory = [f"{self.memory[name] / 2**20:.0f}" if name in self.memory else "-" for name in
                  (published, f"ours fp32{kind}", f"ours bf16{kind}")]  # fmt: skip
        passes = [f"{self.passes[name]:.1f}" for name in (published, "ours")]
        rounds = str(len(self.seconds[published]))
        return [label + kind, self._ms(published), passes[0], *times, passes[1], *shares, *memory, rounds]

    def quotients(self, above: str, below: str) -> list[float]:
        """Of the times of one contender and another, round by round."""
        return [a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)]

    def _ms(self, name: str) -> str:
        return f"{1e3 * statistics.median(self.seconds[name]):.1f}"

    def _quotient(self, above: str, below: str, form: str) -> str:
        quotients = self.quotients(above, below)
        low, high, _ = median_interval(quotients)
        return f"{statistics.median(quotients):{form}} ({low:{form}} to {high:{form}})"


def table(rows: Sequence[StepRow]) -> Table:
    lines = [list(HEADER), *(line for row in rows for line in row.lines())]
    return [line + [""] * (len(HEADER) - len(line)) for line in lines]


def report(path: Path, command: str, facts: Mapping[str, Mapping[str, Any]], rows: Sequence[StepRow]) -> None:
    """Everything as JSON in ``path``, and the table with what it was measured on beside it in markdown."""
    made = [asdict(row) | {"published": row.published} for row in rows]
    parts = [*NOTES, "\n".join(f"- {line}" for line in listed(facts)), markdown(table(rows)), *_kept(rows, command)]
    settings = facts["settings"]
    title = f"Whole training steps, {settings['network']}, batch {settings['batch_size']}"
    write(path, title, command, {**facts, "rows": made}, parts)


def read(path: Path, facts: Mapping[str, Mapping[str, Any]]) -> list[StepRow]:
    """The rows that ``report`` wrote, to go on with ``facts``; raises ValueError if those, or the machine, differ."""
    found = json.loads(path.read_text(encoding="utf-8"))
    before, now = found["settings"] | found["environment"], {**facts["settings"], **environment()}
    for name in before.keys() | now.keys():
        if name not in ("rounds", "row_seconds", "commit") and before.get(name) != now.get(name):
            raise ValueError(f"{path} has {name} = {before.get(name)!r}, this run {now.get(name)!r}: take another file")
    made = {"command": found["command"], "commit": found["environment"].get("commit", "")}
    return [StepRow.of({**made, **row}) for row in found["rows"]]


def _kept(rows: Sequence[StepRow], command: str) -> list[str]:
    """Which rows an earlier command made."""
    steps: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        steps.setdefault((row.command, row.commit), []).append(row.step)
    steps.pop((command, str(environment()["commit"])), None)
    said = [f"- {', '.join(names)}: `{made}`, commit {commit}" for (made, commit), names in steps.items()]
    return ["Kept rows, by what measured them:", "\n".join(said)] if said else []


def listed(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{name}: {value}" for group in facts.values() for name, value in group.items()]

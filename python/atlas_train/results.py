"""What a comparison found: per method its accuracies and its cost, as a table, as markdown and as JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch

from . import tables
from .autoattack import AutoAttacked
from .checkpoint import versions
from .evaluate import ACCURACIES, Evaluation
from .options import fraction, radius

PASSES = "passes/step: the cost of one step, counted in forwards of the network"


@dataclass(frozen=True)
class Result:
    """What a method came to; None where it is not known.

    passes: what a training step costs, in forwards of the network on one batch (see ``passes.passes_per_step``).
    skipped: batches left out of training, for their loss was not finite. data: the record of the test images.
    epoch: whose weights these are, usually the last; raw: those in training, though there is an average. best: what
    those of best.pt came to, which ``rule`` chose.
    validation_share: passes of validation for each pass of training. collapses: epochs in which training collapsed, and
    the sign. rescues: collapses that were taken back (``rescue``). ended: why training ended early.
    """

    evaluation: Evaluation
    training_seconds: float | None = None
    epoch_seconds: float | None = None
    passes: float | None = None
    skipped: int | None = None
    autoattack: AutoAttacked | None = None
    data: dict[str, Any] | None = None
    epoch: int | None = None
    raw: bool | None = None
    best: Result | None = None
    rule: str | None = None
    validation_share: float | None = None
    collapses: Sequence[Sequence[Any]] = ()
    rescues: Sequence[Mapping[str, Any]] = ()
    ended: str | None = None

    @property
    def is_best(self) -> bool:
        """Whether these are the weights of best.pt too."""
        return self.best is not None and (self.best.epoch, self.best.raw) == (self.epoch, self.raw)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; without what is not known."""
        own = {key: value for key, value in asdict(self).items() if key != "evaluation" and value not in (None, ())}
        return self.evaluation.to_dict() | own | ({"best": self.best.to_dict()} if self.best else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        """The inverse of ``to_dict``; TypeError where something is missing."""

        def of(kind: type[Any], values: Mapping[str, Any]) -> Any:
            return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})

        attacked, best = values.get("autoattack"), values.get("best")
        parts = {"evaluation": of(Evaluation, values), "autoattack": attacked and of(AutoAttacked, attacked)}
        parts["best"] = best and cls.from_dict(best)
        return cast(Result, of(cls, {**values, **parts}))


def table(results: Mapping[str, Result]) -> str:
    """Clean, FGSM and PGD accuracy in percent and, where known, what training costs; a line per method, and a second
    where another epoch than the last is the best."""
    return "\n".join([tables.aligned(_rows(results)), _note(results), *_told(results)])


def markdown(results: Mapping[str, Result], title: str, environment: Mapping[str, Any]) -> str:
    """The table as a markdown document that says what it was made with."""
    table = tables.markdown(_rows(results))
    machine = ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)
    told = [line for text in _told(results) for line in (f"{text}.", "")]
    return "\n".join([f"# {title}", "", table, "", _note(results) + ".", "", *told, machine + ".", ""])


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """What the numbers of a run depend on beside its configuration, and when they were made."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "threads": threads,
    }


def cpu_name() -> str:
    """What this machine's CPU is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(said, platform.processor() or platform.machine())


def commit(digits: int = 40) -> str | None:
    """The commit of this package's source, with "-dirty" where it was changed; None outside of a git checkout."""
    here = Path(__file__)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(command, env=clean | {"GIT_OPTIONAL_LOCKS": "0"}, **how).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # or the checkout around it is of something else
        return git("describe", "--always", "--dirty", f"--abbrev={digits}", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _rows(results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    """The header and a row per method; a column of which nothing is known is left out."""
    lines = [line for name, result in results.items() for line in _lines(name, result)]
    rows = [row for _, row in lines]
    first = rows[0].evaluation
    columns = [
        ("method", [name for name, _ in lines]),
        *(
            (header.format(**asdict(first)), [_percent(getattr(row.evaluation, name)) for row in rows])
            for name, header in ACCURACIES.items()
        ),
        (_autoattack_header(rows), [_percent(row.autoattack.accuracy if row.autoattack else None) for row in rows]),
        ("passes/step", [_decimal(row.passes) for row in rows]),
        ("s/epoch", [_decimal(row.epoch_seconds, 2) for row in rows]),
        ("training", [_decimal(row.training_seconds, 1, " s") for row in rows]),
        ("skipped", [str(row.skipped or 0) for row in rows] if any(row.skipped for row in rows) else []),
    ]
    return list(zip(*((header, *cells) for header, cells in columns if any(cells)), strict=True))


def _lines(name: str, result: Result) -> list[tuple[str, Result]]:
    """The lines of a method: its last epoch and, if that is another, the best."""
    name += ", rescued" if result.rescues else ""
    if not result.best or result.is_best:
        return [(name, result)]
    raw = ", weights in training" if result.best.raw else ""
    best = f"{name}, best (epoch {result.best.epoch}{raw})", result.best
    return [(f"{name}, last (epoch {result.epoch})", result), best]


def _told(results: Mapping[str, Result]) -> list[str]:
    """How the best epoch was chosen and what that cost, and what else happened to a run, a line each."""
    told: dict[str, list[float | None]] = {}
    for result in results.values():
        if result.rule:
            told.setdefault(result.rule, []).append(result.validation_share)
    lines = [f"best: the epoch with {rule}{_cost(shares)}" for rule, shares in told.items()]
    if last := [name for name, result in results.items() if result.is_best]:
        lines.append(f"the last epoch is also the best of {', '.join(last)}")
    for name, result in results.items():
        lines += [f"{name} collapsed in epoch {epoch}: {sign}" for epoch, sign in result.collapses]
        for rescue in result.rescues:
            now = ", ".join(f"{key} {pair[1]:.4g}" for key, pair in rescue["changed"].items())
            lines.append(
                f"{name} was rescued: it collapsed in epoch {rescue['epoch']} ({rescue['sign']}) and went back to "
                f"epoch {rescue['back_to']}, " + (f"to go on with {now}" if now else "where it ended")
            )
        if result.ended:
            lines.append(f"{name} ended after epoch {result.epoch}: {result.ended}")
    return lines


def _cost(shares: Sequence[float | None]) -> str:
    known = sorted(100 * share for share in shares if share is not None)
    ends = dict.fromkeys(f"{share:.1f}" for share in (*known[:1], *known[-1:]))
    return f"; validation costs {' to '.join(ends)} % of the passes of training" if known else ""


def _autoattack_header(rows: list[Result]) -> str:
    made = next((row.autoattack for row in rows if row.autoattack), None)
    if made is None:
        return ""
    name = "AA" if made.version == "standard" else "APGD"
    return f"{name}{', ' + made.instead if made.instead else ''} ({made.images:,} images)"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _decimal(value: float | None, places: int = 1, unit: str = "") -> str:
    return "" if value is None else f"{value:.{places}f}{unit}"


def _note(results: Mapping[str, Result]) -> str:
    first = next(iter(results.values())).evaluation
    restarts = f", {first.pgd_restarts} restarts" if first.pgd_restarts > 1 else ""
    passes = f"; {PASSES}" if any(r.passes is not None for r in results.values()) else ""
    steps = f"step {fraction(first.pgd_step_size)}"
    if first.norm == "l1":
        steps = f"steps down to {first.pgd_step_size:.4g}"
    return (
        f"eps {radius(first.eps, first.norm)}; {first.images:,} test images, standard error at most "
        f"{100 * first.error:.1f} points; PGD {steps}{restarts}{passes}"
    )

"""What a comparison found: per method its accuracies and its cost, as a table, as markdown and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch

from atlas_kernels.attacks.progress import counted

from . import tables
from .autoattack import AutoAttacked
from .checkpoint import versions
from .evaluate import ACCURACIES, Evaluation
from .options import fraction, in_words, radius
from .processes import count

#: The results of several methods, by seed.
BySeed = Mapping[int, Mapping[str, "Result"]]
#: A line of the table: what it is called, and what it is the mean of.
Line = tuple[str, Sequence["Result"]]
PASSES = "passes/step: the cost of one step, counted in forwards of the network"
MEMORY = "memory: the most that torch holds at once in training (on a CPU: counted for one step)"


@dataclass(frozen=True)
class Result:
    """What a method came to; None where it is not known.

    passes: what a training step costs, in forwards of the network on one batch (see ``passes.passes_per_step``).
    memory: the most bytes that torch holds at once in training (see ``peak_memory.of_training``).
    skipped: batches left out of training, for their loss was not finite. data: the record of the test images.
    epoch: whose weights these are, usually the last; raw: those in training, though there is an average. best: what
    those of best.pt came to, which ``rule`` chose.
    validation_share: passes of validation and probe for each pass of training. collapses: epochs in which training
    collapsed, and the sign. rescues: collapses that were taken back (``rescue``). ended: why training ended early.
    """

    evaluation: Evaluation
    training_seconds: float | None = None
    epoch_seconds: float | None = None
    passes: float | None = None
    memory: int | None = None
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
    return table_of_seeds({0: results})


def markdown(results: Mapping[str, Result], title: str, environment: Mapping[str, Any]) -> str:
    """The table as a markdown document that says what it was made with."""
    return markdown_of_seeds({0: results}, title, environment)


def table_of_seeds(results: BySeed) -> str:
    """As ``table``, of runs that differ in their seed: means, and the standard deviation where there are several."""
    rows, notes = _of_seeds(results)
    return "\n".join([tables.aligned(rows), *notes])


def markdown_of_seeds(results: BySeed, title: str, environment: Mapping[str, Any]) -> str:
    """As ``markdown``."""
    rows, notes = _of_seeds(results)
    machine = ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)
    told = [line for text in notes for line in (f"{text}.", "")]
    return "\n".join([f"# {title}", "", tables.markdown(rows), "", *told, machine + ".", ""])


def _of_seeds(results: BySeed) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows, and the lines below them."""
    by_seed = list(results.values())
    lines = [line for name in by_seed[0] for line in lines_of(name, [own[name] for own in by_seed])]
    if len(results) == 1:
        return _rows(lines), [_note(by_seed[0]), *remarks(by_seed[0])]
    spread = f"mean ± standard deviation (of n - 1) over the seeds {', '.join(map(str, results))}"
    named = {f"{name}, seed {seed}": result for seed, own in results.items() for name, result in own.items()}
    return _rows(lines), [f"{spread}; {_note(named)}", *remarks(named)]


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
        **({"processes": many} if (many := count()) > 1 else {}),
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


def figures(result: Result) -> dict[str, float]:
    """The numbers of a line of the table, by name; those that are known."""
    known = {name: getattr(result.evaluation, name) for name in ACCURACIES}
    known |= {"autoattack": result.autoattack and result.autoattack.accuracy, "skipped": result.skipped or 0}
    known |= {name: getattr(result, name) for name in ("passes", "epoch_seconds", "training_seconds", "memory")}
    return {name: value for name, value in known.items() if value is not None}


def _rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The header and a row per line; a column of which nothing is known is left out."""
    first = lines[0][1][0]
    columns = {
        **{name: (header.format(**asdict(first.evaluation)), 100.0, 1, " %") for name, header in ACCURACIES.items()},
        "autoattack": (_autoattack_header([row for _, rows in lines for row in rows]), 100.0, 1, " %"),
        "passes": ("passes/step", 1.0, 1, ""),
        "epoch_seconds": ("s/epoch", 1.0, 2, ""),
        "training_seconds": ("training", 1.0, 1, " s"),
        "memory": ("memory", 2.0**-20, 1, " MiB"),
        "skipped": ("skipped", 1.0, 0, ""),
    }
    found = [[figures(row) for row in rows] for _, rows in lines]
    if not any(each["skipped"] for own in found for each in own):
        del columns["skipped"]
    made = [("method", *(name for name, _ in lines))]
    for name, (header, scale, places, unit) in columns.items():
        cells = [_spread([scale * each[name] for each in own if name in each], places, unit) for own in found]
        made += [(header, *cells)] if any(cells) else []
    return list(zip(*made, strict=True))


def _spread(values: Sequence[float], places: int, unit: str) -> str:
    """A number, or the mean of several and their standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{deviation}{unit}"


def lines_of(name: str, results: Sequence[Result]) -> list[Line]:
    """The lines of a method: its last epoch and, if that is another, the best."""
    name += ", rescued" if any(result.rescues for result in results) else ""
    if all(result.best is None or result.is_best for result in results):
        return [(name, results)]
    best = [result.best or result for result in results]
    raw = ", weights in training" if all(result.raw for result in best) else ""
    return [(f"{name}, last ({_epochs(results)})", results), (f"{name}, best ({_epochs(best)}{raw})", best)]


def _epochs(results: Sequence[Result]) -> str:
    ends = dict.fromkeys(f(result.epoch or 0 for result in results) for f in (min, max))
    return f"epoch{'s' * (len(ends) > 1)} {' to '.join(map(str, ends))}"


def remarks(results: Mapping[str, Result]) -> list[str]:
    """How the best epoch was chosen and what that cost, and what else happened to a run, a line each."""
    told: dict[str, list[float | None]] = {}
    for result in results.values():
        if result.rule:
            told.setdefault(result.rule, []).append(result.validation_share)
    lines = [f"best: the epoch with {rule}{_cost(shares)}" for rule, shares in told.items()]
    if last := [name for name, result in results.items() if result.is_best]:
        lines.append(f"the last epoch is also the best of {', '.join(last)}")
    for name, result in results.items():
        lines += [f"! {name}: {sign}" for sign in result.evaluation.signs]
        lines += [f"{name} collapsed in epoch {epoch}: {sign}" for epoch, sign in result.collapses]
        for rescue in result.rescues:
            now = ", ".join(f"{key} {in_words(pair[1])}" for key, pair in rescue["changed"].items())
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
    return f"; validation and probe cost {' to '.join(ends)} % of the passes of training" if known else ""


def _autoattack_header(rows: list[Result]) -> str:
    made = next((row.autoattack for row in rows if row.autoattack), None)
    return "" if made is None else f"{autoattack_name(made.version, made.instead)} ({counted(made.images, 'image')})"


def autoattack_name(version: str, instead: str | None = None) -> str:
    """What tables call a version of AutoAttack."""
    name = {"standard": "AA", "apgd": "APGD"}.get(version, f"AA {version}")
    return f"{name}{', ' + instead if instead else ''}"


def _note(results: Mapping[str, Result]) -> str:
    first = next(iter(results.values())).evaluation
    restarts = f", {first.pgd_restarts} restarts" if first.pgd_restarts > 1 else ""
    costs: dict[str, list[float | None]] = {
        PASSES: [r.passes for r in results.values()],
        MEMORY: [r.memory for r in results.values()],
    }
    told = "".join(f"; {words}" for words, values in costs.items() if any(value is not None for value in values))
    steps = f"step {fraction(first.pgd_step_size)}"
    if first.norm == "l1":
        steps = f"steps down to {fraction(first.pgd_step_size)}"
    return (
        f"eps {radius(first.eps, first.norm)}; {counted(first.images, 'test image')}, standard error at most "
        f"{100 * first.error:.1f} points; PGD {steps}{restarts}{told}"
    )

"""One table of any runs, made of what is stored in their folders."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import tables
from .config import PLACES
from .options import in_words, plain, radius
from .records import Record, read_all
from .results import PASSES, Result, autoattack_name, lines_of
from .results import remarks as remarks_on
from .robustness.named import CLEAN, named
from .robustness.report import MARK

#: Settings that are no column: the table says them elsewhere, or they have no say in the figures.
_UNTOLD = {*PLACES, "hyper", "beside", "seeds", "download", "tensorboard", "eval_size", "autoattack", "norm"}
_UNTOLD |= {"autoattack_version", "awp", "mean", "std", "on_compile_error"}
#: What is said of all runs together where it is the same in all.
_SHARED = ("method", "dataset", "train_size", "model", "width", "eps", "epochs", "batch_size", "seed")
#: An attack as tables call it, and how many images it was run on.
Column = tuple[str, int]


@dataclass(frozen=True)
class Line:
    """A row of the table: a run's last epoch or, with ``again``, its best."""

    name: str
    run: str
    again: bool = False
    accuracies: Mapping[Column, float] = field(default_factory=dict)
    doubtful: frozenset[Column] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """Runs by name, the lines of their table, and what could not be read."""

    records: Mapping[str, Record]
    lines: Sequence[Line]
    left_out: Sequence[str]

    def table(self, form: tables.Form = "text") -> str:
        """The table, and the lines below it."""
        return tables.written(self.rows(), form, self.remarks())

    @property
    def columns(self) -> list[Column]:
        """The accuracies that some run has, the strongest attack last."""
        return _columns(self.lines)

    def rows(self) -> tables.Table:
        """The header, and a row for each line."""
        settings = differing(self.records)
        accuracies, usual = self.columns, _usual(self.columns)
        made: list[tuple[str, ...]] = [("run", *(line.name for line in self.lines))]
        for name, values in settings.items():
            made.append((name, *(values[line.run] for line in self.lines)))
        for column in accuracies:
            title = column[0] if column[1] == usual else f"{column[0]} ({column[1]:,} images)"
            cells = [_percent(line.accuracies.get(column), column in line.doubtful) for line in self.lines]
            made.append((title, *cells))
        for title, words in _COSTS.items():
            cells = ["" if line.again else words(self.records[line.run]) for line in self.lines]
            made += [(title, *cells)] if any(cells) else []
        return list(zip(*made, strict=True))

    def remarks(self) -> list[str]:
        """What is to be said below the table."""
        told = []
        if len(self.records) > 1 and (shared := _same(self.records)):
            told.append("all: " + ", ".join(f"{name} {value}" for name, value in shared.items()))
        if usual := _usual(self.columns):
            passes = any(record.result and record.result.passes for record in self.records.values())
            error = f"{usual:,} test images, standard error at most {50 / usual**0.5:.1f} points"
            told.append(f"{error}; {PASSES}" if passes else error)
        told += remarks_on({name: record.result for name, record in self.records.items() if record.result})
        for name, record in self.records.items():
            if not record.result:
                told += [f"{name} collapsed in epoch {epoch}: {sign}" for epoch, sign in record.collapses]
            told += [f"{MARK} {name}: {doubt}" for doubt in record.doubts]
            for file, values in record.evaluations.items():
                told += [f"{MARK} {name}: {sign.get('text')} ({file})" for sign in values.get("signs", [])]
        told += [f"{MARK} {text}" for text in _other_images(self.records)]
        if bare := [name for name, record in self.records.items() if not (record.result or record.evaluations)]:
            first = self.records[bare[0]].path
            told.append(
                f"not evaluated yet: {', '.join(bare)}; atlas evaluate {plain(first)} --attacks fgsm pgd-20 --json "
                f"{plain(first / 'evaluated.json')} makes figures that stay there"
            )
        return told + [f"{MARK} left out: {text}" for text in self.left_out]


def compared(paths: Sequence[str | os.PathLike[str]]) -> Comparison:
    """The runs at these paths (``records.found``) side by side; nothing is evaluated.

    What is no run, or is damaged, is named in ``left_out``. Raises ValueError if nothing else is there.
    """
    records, left_out = read_all(paths)
    if not records:
        raise ValueError("; ".join(left_out) or "name the folders of runs: atlas compare RUN RUN ...")
    merged = _merged(records)
    names = _named([record.path for record in merged])
    by_name = dict(zip(names, merged, strict=True))
    return Comparison(by_name, [line for name, own in by_name.items() for line in _lines(name, own)], left_out)


def _merged(records: Sequence[Record]) -> list[Record]:
    """The file of an evaluation goes with the run of the same weights, if that is there."""
    kept: list[Record] = []
    for record in sorted(records, key=lambda each: each.path.is_file()):
        own = next(iter(record.evaluations.values()), {}).get("weights") if record.path.is_file() else None
        at = next((i for i, each in enumerate(kept) if own is not None and each.weights == own), None)
        if at is None:
            kept.append(record)
        else:
            kept[at] = replace(kept[at], evaluations={**kept[at].evaluations, **record.evaluations})
    order = [record.path for record in records]
    return sorted(kept, key=lambda each: order.index(each.path))


def _named(paths: Sequence[Path]) -> list[str]:
    """The paths by the parts in which they differ."""
    parts = [path.resolve().parts for path in paths]
    same = os.path.commonpath([Path(*each).parent for each in parts])
    return [plain(Path(*each).relative_to(same)) for each in parts]


def _lines(name: str, record: Record) -> list[Line]:
    """The last epoch and, if that is another, the best."""
    extra, doubtful = _of_evaluations(record)
    if not record.result:
        epoch = f" (epoch {record.epoch})" if record.epoch is not None and len(record.history) else ""
        return [Line(f"{name}{epoch}", name, accuracies=extra, doubtful=doubtful)]
    (title, (last,)), *best = lines_of(name, [record.result])
    lines = [Line(title, name, accuracies={**extra, **_of_result(last)}, doubtful=doubtful)]
    return lines + [Line(title, name, again=True, accuracies=_of_result(own)) for title, (own,) in best]


def _of_result(result: Result) -> dict[Column, float]:
    """The accuracies of evaluation.json."""
    own, attacked = result.evaluation, result.autoattack
    restarts = f"-{own.pgd_restarts}" if own.pgd_restarts > 1 else ""
    pgd = f"PGD-{own.pgd_steps}{restarts}"
    known = {("clean", own.images): own.clean, ("FGSM", own.images): own.fgsm, (pgd, own.images): own.pgd}
    if attacked:
        known[autoattack_name(attacked.version, attacked.instead), attacked.images] = attacked.accuracy
    return known


def _of_evaluations(record: Record) -> tuple[dict[Column, float], frozenset[Column]]:
    """The accuracies at the run's own eps that ``atlas evaluate --attacks --json`` wrote; those with a sign."""
    known: dict[Column, float] = {}
    doubtful: set[Column] = set()
    for values in record.evaluations.values():
        if values["norm"] != record.settings.get("norm"):
            continue
        for each in values["attacks"]:
            if each["eps"] is not None and not math.isclose(each["eps"], record.settings.get("eps") or 0):
                continue
            label = named(each["attack"])[-1].label
            if each["attack"] == "autoattack":
                label = autoattack_name(str(each.get("version", "standard")), each.get("instead"))
            column = label, values["images"]
            known[column] = each["accuracy"]
            signs = [sign for sign in values.get("signs", []) if isinstance(sign, dict)]
            own = {None, each["attack"]}, {None, each["eps"]}
            about = any(sign.get("attack") in own[0] and sign.get("eps") in own[1] for sign in signs)
            if about and each["attack"] != CLEAN:
                doubtful.add(column)
    return known, frozenset(doubtful)


def _columns(lines: Sequence[Line]) -> list[Column]:
    """Clean accuracy first, then from the weakest kind of attack to AutoAttack."""
    columns = dict.fromkeys(column for line in lines for column in line.accuracies)
    kinds = ("clean", "FGSM", "PGD", "CW", "MI", "APGD", "FAB", "Square", "AA")
    rank = {column: next((i for i, kind in enumerate(kinds) if column[0].startswith(kind)), 9) for column in columns}
    return sorted(columns, key=lambda column: rank[column])


def _usual(columns: Sequence[Column]) -> int:
    """The number of images of most columns, of equally many the larger."""
    counts = Counter(images for _, images in columns)
    return max(counts, key=lambda images: (counts[images], images), default=0)


def _percent(share: float | None, doubtful: bool) -> str:
    return "" if share is None else f"{100 * share:.1f} %" + (f" {MARK}" if doubtful else "")


def _passes(record: Record) -> str:
    known = record.result and record.result.passes
    return f"{known:.1f}" if known else ""


def _each_epoch(record: Record) -> str:
    done = (record.epoch or 0) + sum(rescue["epoch"] - rescue["back_to"] for rescue in record.rescues)
    return "" if record.seconds is None or not done else f"{record.seconds / done:.2f}"


def _training(record: Record) -> str:
    return "" if record.seconds is None or not record.epoch else f"{record.seconds:.1f} s"


#: What training cost, which a run's second line does not repeat.
_COSTS = {"passes/step": _passes, "s/epoch": _each_epoch, "training": _training}


def differing(records: Mapping[str, Record]) -> dict[str, dict[str, str]]:
    """The settings in which runs differ: by name, in words by run. Hyper-parameters are compared within a method."""
    words = {name: _in_words(record) for name, record in records.items()}
    names = dict.fromkeys(key for own in words.values() for key in own)
    return {
        key: {name: own.get(key, "") for name, own in words.items()}
        for key in names
        if key not in _UNTOLD and len({own.get(key, "") for own in words.values()}) > 1
    } | _hyper(records)


def _hyper(records: Mapping[str, Record]) -> dict[str, dict[str, str]]:
    """Hyper-parameters in which runs of one method differ."""
    own = {name: _own_hyper(record) for name, record in records.items()}
    differ: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for values in own.values() for key in values):
        by_method: dict[Any, set[str]] = {}
        for name, values in own.items():
            by_method.setdefault(records[name].settings.get("method"), set()).add(values.get(key, ""))
        if any(len(values) > 1 for values in by_method.values()):
            differ[key] = {name: values.get(key, "") for name, values in own.items()}
    return differ


def _own_hyper(record: Record) -> dict[str, str]:
    method = record.settings.get("method")
    values = {key.removeprefix(f"{method}."): value for key, value in record.settings.get("hyper", {}).items()}
    return {key: value_in_words(value) for key, value in values.items() if "." not in key}


def _same(records: Mapping[str, Record]) -> dict[str, str]:
    """The settings of ``_SHARED`` that are the same in all runs."""
    first, *others = (_in_words(record) for record in records.values())
    same = [key for key in _SHARED if first.get(key) and all(own.get(key) == first[key] for own in others)]
    return {key: first[key] for key in same}


def _in_words(record: Record) -> dict[str, str]:
    """The settings as tables write them."""
    settings = dict(record.settings)
    words = {key: value_in_words(value) for key, value in settings.items()}
    if record.label:
        words["method"] = record.label
    if settings.get("eps"):
        words["eps"] = radius(settings["eps"], settings.get("norm") or "linf")
    return words


def value_in_words(value: Any) -> str:
    """The value of a setting as tables write it; of None nothing."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else in_words(value) if isinstance(value, float) else plain(value)


def _other_images(records: Mapping[str, Record]) -> list[str]:
    """What to say where runs are not of the same test images."""
    by_images: dict[str, list[str]] = {}
    for name, record in records.items():
        test = record.data.get("test") or {}
        if sha := test.get("sha256"):
            by_images.setdefault(sha, []).append(name)
    if len(by_images) < 2:
        return []
    groups = "; ".join(", ".join(names) for names in by_images.values())
    return [f"these are not of the same test images, so that their accuracies cannot be compared: {groups}"]

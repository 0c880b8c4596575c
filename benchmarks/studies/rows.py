"""The rows of a study: a CSV file to which processes add finished runs, each row whole or not at all."""

from __future__ import annotations

import csv
import fcntl
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atlas_train.writing import write_bytes, write_text

#: clean, pgd and aa are shares of ``images``, of the weights that validation chose; last_* those of the last epoch.
#: given: what the study sets, as JSON; settings: all that the run was made with.
COLUMNS = (
    "name", "bed", "recipe", "epochs", "eps", "seed", "judge", "attack", "images", "clean", "pgd", "aa",
    "last_clean", "last_pgd", "last_aa", "best_epoch", "epochs_done", "ended", "collapses", "passes", "seconds",
    "epoch_seconds", "memory", "judge_seconds", "parallel", "date", "commit", "torch", "device", "cpu", "threads",
    "verdicts", "given", "settings",
)  # fmt: skip
ROWS = "rows.csv"
KEY = ("name", "judge", "given")
_NUMBERS: dict[str, type[Any]] = {
    **dict.fromkeys(("clean", "pgd", "aa", "last_clean", "last_pgd", "last_aa", "passes"), float),
    **dict.fromkeys(("seconds", "epoch_seconds", "judge_seconds"), float),
    **dict.fromkeys(("epochs", "seed", "images", "best_epoch", "epochs_done", "memory", "parallel", "threads"), int),
}
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows so far; None where nothing is known."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [{name: _value(name, row.get(name)) for name in COLUMNS} for row in found]


def _value(name: str, text: str | None) -> Any:
    return _NUMBERS.get(name, str)(text) if text else None


def append(path: Path, row: Mapping[str, Any]) -> bool:
    """Adds the row, unless there is one of the same run: then nothing is changed, and False comes back. The file is the
    old or the new one, whole, also where two processes add to it."""
    if unknown := row.keys() - set(COLUMNS):
        raise ValueError(f"a row has no {', '.join(sorted(unknown))} (known: {', '.join(COLUMNS)})")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        rows = read(path)
        if any(key(known) == key(row) for known in rows):
            return False
        write_text(path, _text([*rows, row]))
    return True


def merge(source: Path, target: Path) -> int:
    """Adds the rows of a folder that was filled elsewhere, and the verdicts that they name; how many were new."""
    known = set(map(key, read(target / ROWS)))
    new = [row for row in read(source / ROWS) if key(row) not in known]
    for row in new:
        if row["verdicts"]:
            write_bytes(target / row["verdicts"], (source / row["verdicts"]).read_bytes())
        append(target / ROWS, row)
    return len(new)


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a run is known by."""
    return tuple(row[name] for name in KEY)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: "" if value is None else value for name, value in row.items()} for row in rows])
    return file.getvalue()

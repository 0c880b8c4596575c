"""What runs have left in their folders, read without their weights: settings, epochs, accuracies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checkpoint, schema
from .compare import EVALUATION, RESULTS
from .config import from_record, to_dict
from .options import plain
from .results import Result
from .watch import collapses, telling_of

#: How far below a folder runs are looked for: seeds/seed-0/method.
_DEPTH = 3
#: JSON files of a run that no ``atlas evaluate --json`` wrote.
_OWN_JSON = (EVALUATION, RESULTS, "config.json")


@dataclass(frozen=True, eq=False)
class Record:
    """A run, or one file of ``atlas evaluate --json``; None and empty where nothing is stored.

    settings: by their names in ``TrainConfig``, hyper-parameters in use under "hyper". result: what evaluation.json
    holds; weights: the sha256 of those that it is of. evaluations: what ``atlas evaluate --attacks --json`` wrote, by
    file. doubts: what stands against taking a part of it.
    """

    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    arch: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    epoch: int | None = None
    seconds: float | None = None
    rescues: Sequence[Mapping[str, Any]] = ()
    result: Result | None = None
    weights: str | None = None
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    command: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    doubts: Sequence[str] = ()

    @property
    def label(self) -> str:
        """What it was trained with, as tables call it; of an evaluation's file, the network."""
        method = self.settings.get("method", "")
        return f"{method}+awp" if self.settings.get("awp") else str(method)

    @property
    def collapses(self) -> list[tuple[int, str]]:
        """Epochs in which training collapsed, and the sign: as evaluation.json says, or by the numbers of epochs."""
        if self.result and self.result.epoch == self.epoch:
            return [(int(epoch), str(sign)) for epoch, sign in self.result.collapses]
        own = self.settings
        validated = 0 if own.get("val_step_size") else own.get("val_size") or 0
        halves = telling_of(own.get("norm", "linf"), validated, own.get("probe_size") or 0)
        return list(collapses(self.history, halves))


def found(path: str | os.PathLike[str]) -> list[Path]:
    """The runs that a path means: a run's folder or a file in it, every run below a folder, a file of ``atlas evaluate
    --json``. Raises FileNotFoundError or ValueError for what holds none."""
    given = Path(path)
    if not given.exists():
        raise FileNotFoundError(f"{plain(given)} does not exist")
    if given.is_file():
        if given.suffix == ".json":
            return [given]
        if given.name in (checkpoint.LAST, checkpoint.BEST) or given.suffix == ".safetensors":
            return [given.parent]
        raise ValueError(f"{plain(given)} is no run: give the folder of one, or what `atlas evaluate --json` wrote")
    if _is_run(given):
        return [given]
    below = sorted({own for depth in range(1, _DEPTH + 1) for own in given.glob("/".join("*" * depth)) if _is_run(own)})
    below = [own for own in below if own.parent not in below]  # not what was exported into a run's folder
    if not below:
        raise ValueError(f"{plain(given)} holds no run of atlas train: no {checkpoint.LAST}, no {checkpoint.WEIGHTS}")
    return below


def read_all(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Record], list[str]]:
    """What is stored at these paths, each run once, and what had to be left out, in words."""
    runs: dict[Path, None] = {}
    records: list[Record] = []
    left_out: list[str] = []
    for path in paths:
        try:
            runs |= dict.fromkeys(found(path))
        except (ValueError, OSError) as error:
            left_out.append(str(error))
    for run in runs:
        try:
            records.append(read(run))
        except (ValueError, OSError) as error:
            left_out.append(str(error))
    return records, left_out


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (checkpoint.LAST, checkpoint.WEIGHTS))


def read(path: Path) -> Record:
    """What is stored at one of the paths that ``found`` gives. Raises ValueError for a damaged or foreign file."""
    if path.is_file():
        return _of_evaluation(path)
    state = checkpoint.facts(path)
    settings = to_dict(from_record(state["config"], plain(path)))
    values = _json(path / EVALUATION) if (path / EVALUATION).is_file() else None
    if values is not None:
        schema.require_evaluation(values, plain(path / EVALUATION))
    result, of = (Result.from_dict(values), values.get("of") or {}) if values else (None, {})
    weights = str(of["weights"]) if "weights" in of else None
    doubts: list[str] = []
    around = _around(path, settings["method"])
    hyper = {**settings["hyper"], **around.get("hyper", {}), **state.get("hyper", {})}
    epoch = state.get("epoch", result and result.epoch)
    if result and result.epoch is not None and epoch is not None and result.epoch != epoch:
        doubts.append(
            f"its accuracies are of epoch {result.epoch}, and it has been trained to epoch {epoch} since: atlas "
            f"evaluate {plain(path)}"
        )
    evaluations = dict(_evaluations(path, weights, doubts))
    return Record(
        path, settings | {"hyper": hyper}, state["arch"], state.get("data", {}), state.get("history", ()), epoch,
        state.get("seconds", result and result.training_seconds), state.get("rescues", ()), result, weights,
        evaluations, around.get("command"), around.get("environment") or {}, tuple(doubts),
    )  # fmt: skip


def _around(folder: Path, method: str) -> dict[str, Any]:
    """Command, machine and hyper-parameters in results.json, of the run alone or of the comparison around it."""
    for path in (folder / RESULTS, folder.parent / RESULTS):
        if path.is_file():
            values = _json(path)
            own = values.get("methods")
            mine = own.get(method, {}) if isinstance(own, dict) else {}
            hyper = mine.get("hyper", {}) if isinstance(mine, dict) else {}
            return {"command": values.get("command"), "environment": values.get("environment"), "hyper": hyper}
    return {}


def _evaluations(folder: Path, weights: str | None, doubts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What ``atlas evaluate --attacks --json`` wrote into the folder, if it is of the run's last epoch."""
    for path in sorted(folder.glob("*.json")):
        if path.name in _OWN_JSON:
            continue
        try:
            values = _report(path)
        except ValueError as error:
            doubts.append(f"{error}; it is left out")
            continue
        if values["weights"] == weights or weights is None:
            yield path.name, values
        else:
            doubts.append(f"{path.name} is of other weights than those of the last epoch: left out")


def _of_evaluation(path: Path) -> Record:
    """The file of an evaluation as a row of its own."""
    values = _json(path)
    if "evaluation" in values:
        report = _report(path)
        settings = {"dataset": report.get("dataset"), "norm": report["norm"], "eps": report["attacks"][-1]["eps"]}
        settings |= {"model": report.get("architecture")}
        machine = report.get("environment") or {}
        own = {path.name: report}
        return Record(path, settings, data=report.get("data") or {}, evaluations=own, environment=machine)
    try:
        schema.require_evaluation(values, plain(path))
    except ValueError as error:
        raise ValueError(f"{plain(path)} is not what `atlas evaluate --json` writes: {error}") from error
    result = Result.from_dict(values)
    settings = {"eps": result.evaluation.eps, "norm": result.evaluation.norm}
    return Record(path, settings, data=result.data or {}, epoch=result.epoch, result=result)


def _report(path: Path) -> dict[str, Any]:
    """The part of a file of ``atlas evaluate --attacks --json`` that says what was measured."""
    values = _json(path).get("evaluation")
    if not isinstance(values, dict):
        raise ValueError(f"{plain(path)} is not what `atlas evaluate --attacks --json` writes")
    schema.require_report(values, plain(path))
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{plain(path)} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{plain(path)} must hold one JSON object, got {type(values).__name__}")
    return values

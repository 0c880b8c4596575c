"""A collapse that is taken back: the run goes back to best.pt, and on from there with a stronger attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import checkpoint, processes, saving
from .config import TrainConfig, from_record
from .options import in_words
from .remembered import begins_anew
from .run import Run

#: After so many a run ends: what returns at every strength of the attack is no overfitting to it.
MOST = 3


def require_possible(config: TrainConfig, has_folder: bool) -> None:
    """Raises ValueError, naming the setting, for one that needs validation, or best.pt, where there is none."""
    asked = {"on_collapse='rollback'": config.on_collapse == "rollback", "early_stop": config.early_stop > 0}
    for setting, given in asked.items():
        if given and not config.val_size:
            raise ValueError(
                f"config: {setting} goes by validation, and val_size is 0, so there is nothing to go back to or to "
                "compare with: hold images out for it (val_size), or leave the setting out"
            )
    if config.on_collapse == "rollback" and not has_folder:
        raise ValueError(
            "config: on_collapse='rollback' has nothing to go back to without best.pt: give train a folder, or set "
            "on_collapse='stop'"
        )


class Collapsed(Exception):
    """Training collapsed, in a run that can go back; says how that shows."""


def goes_back(run: Run) -> bool:
    """Whether a collapse is taken back."""
    return run.config.on_collapse == "rollback" and run.best > 0


def take_back(run: Run, epoch: int, sign: str, *, stronger: bool) -> str:
    """Puts the run back to best.pt after a collapse in ``epoch``; returns what became of it, in words.

    stronger: the attack has one step more from there on. If not, or if the method has no steps, or this was done often
    already, the run ends there. The seconds that were lost still count.
    """
    assert run.folder
    source = run.folder / checkpoint.BEST
    changed = _stronger(run) if stronger else {}
    run.config = with_attack(run.config, changed)
    run.method = run.config.build_method()
    saving.put(run, processes.of_first(lambda: checkpoint.load(source, ("arch", "config"))), source)
    run.rescues.append({"epoch": epoch, "back_to": run.epoch, "sign": sign, "changed": changed})
    why = "" if changed else _why_no_further(run, stronger)
    run.ended = why and f"training collapsed in epoch {epoch}, and {why}"
    saving.save(run)
    more = ", ".join(f"{name} {in_words(now)} (before: {in_words(then)})" for name, (then, now) in changed.items())
    so = f"and on from there with {more}" if changed else f"where the run ends, as {why}"
    anew = "" if run.ended else begins_anew(run.method, run.memory)
    return f"{sign} in epoch {epoch}: back to epoch {run.epoch}, the best, {so}{f'; {anew}' if anew else ''}"


def _why_no_further(run: Run, stronger: bool) -> str:
    if not stronger:
        return "a stronger attack does not help against that"
    if "steps" in run.method.in_use():
        return f"{MOST} stronger attacks have not helped"
    return f"{run.config.method} has no attack steps, of which it could make more"


def _stronger(run: Run) -> dict[str, list[Any]]:
    """What gives the method's attack one step more: [before, now] by hyper-parameter; nothing if it has no steps.

    Two steps reach no further in all than the 1.25 eps of the usual one, so that the second need not end in a corner.
    """
    used, eps = run.method.in_use(), run.config.eps
    if "steps" not in used or len(run.rescues) >= MOST:
        return {}
    changed = {"steps": [used["steps"], used["steps"] + 1]}
    if used["steps"] == 1 and used.get("step_size"):
        changed["step_size"] = [used["step_size"], min(used["step_size"], 1.25 * eps / 2)]
    if used.get("wide_start"):  # which is of one step
        changed["wide_start"] = [used["wide_start"], 0.0]
    if used.get("start_noise") == "wide":
        changed["start_noise"] = ["wide", "uniform"]
    return changed


def with_attack(config: TrainConfig, changed: Mapping[str, list[Any]]) -> TrainConfig:
    """The configuration with these hyper-parameters of its method, unless it has others than those from before."""
    given = config.hyper_of(config.method)
    new = {f"{config.method}.{name}": now for name, (then, now) in changed.items() if given.get(name) in (None, then)}
    return replace(config, hyper={**config.hyper, **new})


def as_left(config: TrainConfig, state: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a run that goes on, with the images that its checkpoint holds out, if it names no number,
    and the attack that collapses have left it with."""
    if config.val_size is None:
        config = replace(config, val_size=from_record(state["config"]).val_size)
    if config.method == state["config"].get("method"):
        for rescue in state.get("rescues", []):
            config = with_attack(config, rescue["changed"])
    return config

"""What a user sees while a model trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from .attack_share import AttackShare
from .options import plain


class Display(Protocol):
    """Is told of every epoch, and of a step whenever it wants one (a row of numbers waits for the device)."""

    def start(self, title: str, steps: int) -> None: ...
    def wants_step(self) -> bool: ...
    def step(self, row: Mapping[str, Any]) -> None: ...
    def epoch(self, row: Mapping[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, title: str, steps: int) -> None: ...
    def wants_step(self) -> bool:
        return False

    def step(self, row: Mapping[str, Any]) -> None: ...
    def epoch(self, row: Mapping[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Plain:
    """A line per epoch, but not more than one in two seconds, and one every half minute in a long epoch."""

    every, at_most = 30.0, 2.0
    _share: AttackShare | None = None

    def start(self, title: str, steps: int) -> None:
        self.say(title)
        self._share = AttackShare().start()

    def wants_step(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def step(self, row: Mapping[str, Any]) -> None:
        self.say("  " + "  ".join(describe(_with_share(row, self._share))))

    def epoch(self, row: Mapping[str, Any]) -> None:
        if row["epoch"] == row["epochs"] or time.monotonic() - self._last >= self.at_most:
            self.step(row)

    def say(self, text: str) -> None:
        self._last = time.monotonic()
        print(text, flush=True)

    def stop(self) -> None:
        if self._share:
            self._share.stop()


class Live:
    """A bar that moves four times a second (rich)."""

    every = 0.25
    _share: AttackShare | None = None

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=12),  # all of it fits into 80 columns
            TaskProgressColumn(),
            TextColumn("{task.fields[now]}"),
        )

    def start(self, title: str, steps: int) -> None:
        self._last = 0.0
        self._bar.print(title, highlight=False)
        self._task = self._bar.add_task(title.split(":")[0], total=steps, now="")
        self._bar.start()
        self._share = AttackShare().start()

    def wants_step(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def step(self, row: Mapping[str, Any]) -> None:
        self._last = time.monotonic()
        self._bar.update(self._task, completed=row["step"], now="\n".join(describe(_with_share(row, self._share))))

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.step(row)

    def say(self, text: str) -> None:
        self._bar.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._bar.stop()
        if self._share:
            self._share.stop()


def make(kind: str = "auto") -> Display:
    """The display for standard output. kind: auto (a bar on a terminal that has rich), live, plain or silent."""
    if kind == "auto":
        kind = "live" if sys.stdout and sys.stdout.isatty() and _has_rich() else "plain"
    if kind not in ("live", "plain", "silent"):
        raise ValueError(f"progress must be auto, live, plain or silent, got {kind!r}")
    kinds: dict[str, type[Display]] = {"live": Live, "plain": Plain, "silent": Silent}
    return kinds[kind]()


def _has_rich() -> bool:
    from importlib.util import find_spec

    return find_spec("rich") is not None


def _with_share(row: Mapping[str, Any], share: AttackShare | None) -> Mapping[str, Any]:
    return {**row, "attack": share.share} if share else row


def describe(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row of numbers in words: how far and how fast; loss and accuracies, and where the time goes."""
    time_left = f"{row['images_per_s']:,.0f} images/s  ETA {clock(row['eta'])}"
    parts = [f"loss {row['loss']:.3f}"]
    names = {"clean": "clean", "adv": "adv", "probe": "PGD-5", "probe_10": "PGD-10"}
    names |= {"val_clean": "val", "val_pgd": "val PGD-10"}
    parts += [f"{text} {100 * row[key]:.1f} %" for key, text in names.items() if row.get(key) is not None]
    if row.get("attack") is not None:
        parts.append(f"attack {100 * row['attack']:.0f} % of the step")
    if row.get("data_wait") is not None:
        parts.append(f"data wait {100 * row['data_wait']:.0f} %")
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']}")
    return f"epoch {row['epoch']}/{row['epochs']}  step {row['step']}  {time_left}", "  ".join(parts)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def headline(name: str, dataset: str, images: int, model: str, parameters: int, ball: str, device: str) -> str:
    """The line above a run's progress."""
    what, network = f"{plain(dataset)}, {images:,} images", f"{plain(model)} ({parameters:,} parameters)"
    return f"{name}: {what}, {network}, eps {ball}, {device}"

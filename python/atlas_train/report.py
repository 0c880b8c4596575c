"""What training and evaluation leave behind: a CSV log, pictures of curves and TensorBoard events."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .options import NORMS, Norm, fraction, plain
from .robustness.report import ALL
from .writing import write_atomically, write_text

Row = Mapping[str, Any]
COLUMNS = (
    "epoch", "step", "lr", "loss", "clean", "adv", "probe", "probe_10", "val_clean", "val_pgd_5", "val_pgd",
    "images_per_s", "seconds",
)  # fmt: skip


def write_csv(path: Path, history: Sequence[Row]) -> None:
    """All epochs so far, one row each. The whole file is written anew, so a resumed run leaves no row twice."""
    extra = sorted({key for row in history for key in row} - set(COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *extra], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in row.items()} for row in history)
    write_text(path, text.getvalue())


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else "" if value is None else value


def write_curves(path: Path, histories: Mapping[str, Sequence[Row]]) -> bool:
    """A PNG of loss and accuracies over the epochs, one colour per method. False where matplotlib is not installed."""
    if not has_matplotlib():
        return False
    _save(path, curves_figure(histories))
    return True


def curves_figure(histories: Mapping[str, Sequence[Row]], collapses: Mapping[str, Sequence[int]] | None = None) -> Any:
    """Loss and accuracies over the epochs, one colour per run, with a vertical line where one collapsed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"clean": ":", "adv": "--", "probe": "-", "val_pgd": "-."}
    for number, (name, history) in enumerate(histories.items()):
        colour = colormaps["tab20"](number % 20)
        left.plot([row["epoch"] for row in history], [row["loss"] for row in history], color=colour, label=name)
        for key, style in styles.items():
            points = [(row["epoch"], 100 * row[key]) for row in history if row.get(key) is not None]
            if points:
                right.plot(*zip(*points, strict=True), color=colour, linestyle=style)
        for epoch in (collapses or {}).get(name, ()):
            for axes in (left, right):
                axes.axvline(epoch, color=colour, alpha=0.4, linewidth=4)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="accuracy on training images (%)", ylim=(0, 100))
    left.legend(fontsize="small", ncols=1 + len(histories) // 8)
    names = {"clean": "clean", "adv": "own attack", "probe": "PGD-5", "val_pgd": "validation, PGD-10"}
    for key, style in styles.items():
        right.plot([], [], color="black", linestyle=style, label=names[key])
    if any((collapses or {}).values()):
        right.plot([], [], color="black", alpha=0.4, linewidth=4, label="collapse")
    right.legend(fontsize="small")
    return figure


def _save(path: Path, figure: Any) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raises ImportError that says how to get it, where it is missing."""
    if not has_matplotlib():
        raise ImportError("a curve needs matplotlib: pip install 'atlas-kernels[train]'")


def picture_form(path: Path) -> str:
    """What a picture of that name holds. Raises ValueError for what is not drawn."""
    form = path.suffix.lower().removeprefix(".") or "png"
    if form not in ("png", "pdf", "svg"):
        raise ValueError(f"curve {plain(path)}: a .{plain(form)} is not drawn: name it .png, .pdf or .svg")
    return form


def write_robustness(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], norm: Norm) -> None:
    """Draws accuracy over eps, a line for each attack, so that none hides another: later ones are broken, and that of
    all attacks is a grey band."""
    require_matplotlib()
    form = picture_form(path)
    figure = robustness_figure(curves, norm)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=form, dpi=120))


def robustness_figure(curves: Mapping[str, Sequence[tuple[float, float]]], norm: Norm) -> Any:
    """Accuracy over eps, a line for each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    grey = all(eps == 0 or fraction(eps).endswith("/255") for points in curves.values() for eps, _ in points)
    scale, unit = (255.0, " / 255") if grey else (1.0, "")
    for number, (name, points) in enumerate(curves.items()):
        radii, shares = zip(*points, strict=True)
        style: dict[str, Any] = {"linestyle": ("-", "--", "-.", ":")[number % 4], "marker": "o"}
        if name == ALL:
            style = {"color": "black", "alpha": 0.2, "linewidth": 7, "zorder": 1}
        axes.plot([scale * eps for eps in radii], [100 * share for share in shares], label=name, clip_on=False, **style)
    axes.set(xlabel=f"eps{unit} ({NORMS[norm]})", ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def time_figure(points: Mapping[str, tuple[float, float]], attack: str) -> Any:
    """Robust accuracy over the seconds of training, a point for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (seconds, share) in points.items():
        axes.plot([seconds], [100 * share], marker="o", linestyle="", label=name)
        axes.annotate(name, (seconds, 100 * share), xytext=(5, 5), textcoords="offset points", fontsize="small")
    axes.set(xlabel="training (s)", ylabel=f"accuracy under {attack} (%)", ylim=(0, 100))
    axes.set_xlim(0, 1.25 * max(seconds for seconds, _ in points.values()))  # room for the last name
    axes.grid(alpha=0.3)
    return figure


def png_of(figure: Any) -> bytes:
    """A figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


class TensorBoard:
    """Writes the numbers of each epoch as scalars, after its checkpoint: a resumed run repeats none.

    TensorBoard's own writer puts the name of the machine into that of the file.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            raise ValueError("tensorboard=True needs a folder to write to: give train one")
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ImportError("tensorboard=True needs TensorBoard: pip install 'atlas-kernels[train]'") from error
        self._event = Event
        self._writer = RecordWriter((folder / f"events.out.tfevents.{time.time():.6f}").open("xb"))
        self._add(file_version="brain.Event:2")

    def write(self, row: Row) -> None:
        found = [{"tag": key, "simple_value": value} for key, value in row.items() if value is not None]
        self._add(step=row["step"], summary={"value": [each for each in found if each["tag"] not in ("epoch", "step")]})

    def _add(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

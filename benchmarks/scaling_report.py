"""What the scaling study found, as tables and as figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_train.writing import write_atomically
from tables import Table

PRECISIONS = ("fp32", "bf16")
ATTACK = "PGD"
AXES = {
    "batch": "images in a batch",
    "image": "side of the image (pixels), batch of 8",
    "classes": "classes",
    "steps": "steps of the attack, batch of 16",
    "threads": "CPU threads",
}
NOTE = (
    "Medians of rounds in one process, every point once a round in an order drawn anew; +-: half the range over the "
    "rounds. Shares of the time: passes, of the bare passes of the network that the work is made of; flops, of its "
    "floating-point operations at the rate of a large matrix product of the same precision and threads; operators, of "
    "the attack's own operators (random start, cotangent, step). All measured in the same run."
)
Rows = Sequence[dict[str, Any]]


def groups(rows: Rows) -> Iterator[tuple[str, str, Rows]]:
    """The rows of one work on one network along one axis, with the network's name and the axis."""
    for work, name, axis in dict.fromkeys((r["work"], r["network"], r["axis"]) for r in rows):
        yield name, axis, [r for r in rows if (r["work"], r["network"], r["axis"]) == (work, name, axis)]


def tables(rows: Rows) -> dict[str, Table]:
    """By heading: milliseconds per image, their spread, and what share of them the floors and the operators are."""
    found: dict[str, Table] = {}
    for name, axis, own in groups(rows):
        work, width = own[0]["work"], own[0]["width"]
        columns = ["ms/image", "+-", "passes", "flops", *(["operators"] if work == ATTACK else [])]
        lines = [[AXES[axis], *(f"{precision} {column}" for precision in PRECISIONS for column in columns)]]
        for at in dict.fromkeys(r["at"] for r in own):
            lines.append([f"{at:,}", *(cell for r in own if r["at"] == at for cell in _cells(r))])
        found[f"{work}, {name} of width {width}, by {axis}"] = lines
    return found


def _cells(r: dict[str, Any]) -> list[str]:
    median, low, high = (r["seconds"][key] for key in ("median", "low", "high"))
    cells = [f"{1e3 * median / r['batch']:.3f}", f"{(high - low) / 2 / median:.0%}"]
    cells += [f"{r[floor] / median:.0%}" for floor in ("passes_seconds", "flops_seconds")]
    return cells if r["operators_seconds"] is None else [*cells, f"{r['operators_seconds'] / median:.1%}"]


def draw(rows: Rows, folder: Path, name: str) -> list[Path]:
    """A PNG per work, a panel per network and axis. Raises ModuleNotFoundError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'atlas-kernels[train]'") from error
    drawn = []
    for work in dict.fromkeys(r["work"] for r in rows):
        panels = list(groups([r for r in rows if r["work"] == work]))
        figure = Figure(figsize=(11, 2.8 * -(-len(panels) // 3)), layout="constrained")
        axes = list(figure.subplots(-(-len(panels) // 3), 3, squeeze=False).flat)
        for ax, (network, axis, own) in zip(axes, panels, strict=False):
            _panel(ax, axis, own)
            ax.set_title(f"{network}, width {own[0]['width']}", fontsize="small")
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize="small", frameon=False, title=work)
        path = folder / f"{name}-{work.lower()}.png"
        write_atomically(path, lambda temporary, figure=figure: figure.savefig(temporary, format="png", dpi=100))
        drawn.append(path)
    return drawn


def _panel(ax: Any, axis: str, rows: Rows) -> None:
    for precision, colour in zip(PRECISIONS, ("tab:blue", "tab:orange"), strict=True):
        own = [r for r in rows if r["precision"] == precision]
        at = [r["at"] for r in own]

        def line(what: list[float], style: str, label: str, own: Rows = own, at: Any = at, c: str = colour) -> None:
            milli = [1e3 * value / r["batch"] for value, r in zip(what, own, strict=True)]
            ax.plot(at, milli, style, color=c, label=label, markersize=3, linewidth=1.2)

        line([r["seconds"]["median"] for r in own], "o-", f"{precision}, measured")
        line([r["passes_seconds"] for r in own], "--", "its bare passes")
        line([r["flops_seconds"] for r in own], ":", "its flops")
        if own and own[0]["operators_seconds"] is not None:
            line([r["operators_seconds"] for r in own], "-.", "its operators")
        low, high = ([1e3 * r["seconds"][key] / r["batch"] for r in own] for key in ("low", "high"))
        ax.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
    ticks = sorted({r["at"] for r in rows})
    ax.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="ms per image")
    ax.set_xticks(ticks, [str(tick) for tick in ticks], fontsize="small")
    ax.minorticks_off()

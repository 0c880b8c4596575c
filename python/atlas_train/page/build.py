"""The page: its sections, each made of what is stored or, of few test images, measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

import atlas_kernels

from .. import data
from ..comparison import Comparison, compared
from ..evaluate import Say
from ..options import Norm, one_line, plain, radius
from ..records import Record
from ..report import curves_figure, has_matplotlib, png_of, robustness_figure, time_figure
from ..robustness.named import CLEAN, named
from . import html
from .html import Html
from .measured import Attacked, Measured, described, drawn, measured
from .png import png

_NO_MATPLOTLIB = "left out: it needs matplotlib, which is not installed (pip install 'atlas-kernels[train]')"


@dataclass(frozen=True, eq=False)
class Page:
    """html: the whole file. pictures: its plots as PNG files, by name. left_out: what it does not show, and why."""

    html: str
    pictures: Mapping[str, bytes]
    left_out: Sequence[str]


@dataclass(eq=False)
class _Parts:
    """What the sections are made of, and what they leave behind."""

    runs: Comparison
    seed: int
    images: int
    made: Mapping[str, Measured]
    reasons: Mapping[str, str]
    pictures: dict[str, bytes] = field(default_factory=dict)

    def plot(self, name: str, draw: Callable[[], Any]) -> Html:
        """A plot, or why it is not there."""
        if not has_matplotlib():
            return html.paragraph(_NO_MATPLOTLIB, "note")
        self.pictures[name] = png_of(draw())
        return html.image(self.pictures[name], name.replace("-", " "))

    @property
    def missing(self) -> Html:
        """The runs that could not be measured."""
        return html.items([f"! left out: {name}: {reason}" for name, reason in self.reasons.items()])


def page_of(
    paths: Sequence[str | os.PathLike[str]],
    *,
    images: int = 200,
    gallery: int = 6,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    say: Say = print,
    **where: Any,
) -> Page:
    """A page of the runs at these paths.

    images: test images on which is measured what no folder holds, accuracy over eps and by class; 0: it is left out.
    gallery: adversaries of each run that are shown, of images that the seed draws. where: the data and the network of
    runs on data or networks of one's own, as for ``targets.opened``. Raises ValueError where there is no run at all.
    """
    runs = compared(paths)
    made: dict[str, Measured] = {}
    reasons: dict[str, str] = {}
    for name, record in runs.records.items():
        needed = images if not _with_radii(record) or not _by_class(record) else 0
        if record.path.is_file() or not (needed or gallery):
            continue
        say(f"{name}: " + (f"PGD on {needed:,} test images" if needed else "adversaries"))
        how: dict[str, Any] = {"device": device, "threads": threads, "say": lambda text: None, **where}
        try:
            made[name] = measured(str(record.path), images=needed, gallery=gallery, seed=seed, **how)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            reasons[name] = " ".join(str(error).split()) or one_line(error)
            say(f"{name}: {reasons[name]}")
    parts = _Parts(runs, seed, images, made, reasons)
    title = plain(next(iter(runs.records))) if len(runs.records) == 1 else f"{len(runs.records)} runs"
    body = html.joined([html.tag("h1", html.text(f"atlas: {title}")), _made_by(), *(each(parts) for each in _SECTIONS)])
    left_out = [*runs.left_out, *(f"{name}: {reason}" for name, reason in reasons.items())]
    left_out += [] if has_matplotlib() else ["plots: matplotlib is not installed"]
    return Page(html.document(f"atlas: {title}", body), parts.pictures, left_out)


def _made_by() -> Html:
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return html.paragraph(
        f"made {when} by atlas-kernels {atlas_kernels.__version__}, torch {torch.__version__}", "note"
    )


def _figures(parts: _Parts) -> Html:
    """The table of ``atlas compare``."""
    return html.section("Figures", html.table(parts.runs.rows()), html.items(parts.runs.remarks()))


def _curves(parts: _Parts) -> Html:
    histories = {name: record.history for name, record in parts.runs.records.items() if len(record.history)}
    if not histories:
        return html.section(
            "Learning curves", html.paragraph("left out: no folder holds the numbers of epochs", "note")
        )
    signs = {name: parts.runs.records[name].collapses for name in histories}
    epochs = {name: [epoch for epoch, _ in own] for name, own in signs.items()}
    plot = parts.plot("learning-curves", lambda: curves_figure(histories, epochs))
    told = [f"! {name} collapsed in epoch {epoch}: {sign}" for name, own in signs.items() for epoch, sign in own]
    quiet = html.paragraph("No collapse was seen.", "note")
    return html.section("Learning curves", plot, html.items(told) if told else quiet)


def _with_radii(record: Record) -> Mapping[str, Any] | None:
    """A stored evaluation at several radii."""
    return next((own for own in record.evaluations.values() if len(_radii(own)) > 1), None)


def _radii(values: Mapping[str, Any]) -> set[float]:
    return {each["eps"] for each in values["attacks"] if each["eps"] is not None}


def _over_eps(parts: _Parts) -> Html:
    """Robust accuracy against eps, a plot for each norm."""
    curves: dict[Norm, dict[str, list[tuple[float, float]]]] = {}
    told: list[str] = []
    for name, record in parts.runs.records.items():
        stored, own = _with_radii(record), parts.made.get(name)
        values = stored or (own.evaluation if own else None)
        if not values:
            continue
        curves.setdefault(values["norm"], {}).update(_of_attacks(name, values))
        made_here = described(own.eps, own.norm, values["images"], parts.seed) if own and not stored else ""
        told.append(f"{name}: {made_here or _stored(record, values)}")
    plots = [
        parts.plot(f"accuracy-over-eps-{norm}", partial(robustness_figure, own, norm)) for norm, own in curves.items()
    ]
    nothing = [] if curves else [html.paragraph("left out: no folder holds it, and nothing was measured", "note")]
    return html.section("Robust accuracy against eps", *plots, *nothing, html.items(told), parts.missing)


def _stored(record: Record, values: Mapping[str, Any]) -> str:
    file = next(file for file, own in record.evaluations.items() if own is values)
    return f"{values['images']:,} test images, from {file}"


def _of_attacks(name: str, values: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """By attack, accuracy over eps from 0, where it is clean accuracy."""
    clean = next((each["accuracy"] for each in values["attacks"] if each["attack"] == CLEAN), None)
    found: dict[str, list[tuple[float, float]]] = {}
    for each in values["attacks"]:
        if each["eps"] is not None:
            found.setdefault(f"{name}, {_label(each)}", []).append((each["eps"], each["accuracy"]))
    start = [] if clean is None else [(0.0, clean)]
    return {label: start + sorted(points) for label, points in found.items()}


def _label(attack: Mapping[str, Any]) -> str:
    return named(attack["attack"])[-1].label


def _over_time(parts: _Parts) -> Html:
    """The strongest attack that all runs have, beside what training took."""
    last = [line for line in parts.runs.lines if not line.again]
    common = [column for column in parts.runs.columns if all(column in line.accuracies for line in last)]
    robust = [column for column in common if column[0] != "clean"]
    seconds = {line.run: parts.runs.records[line.run].seconds for line in last}
    points = {
        line.run: (float(seconds[line.run] or 0), line.accuracies[robust[-1]])
        for line in last
        if robust and seconds[line.run]
    }
    if len(points) < 2:
        reason = "left out: it takes two runs or more that were evaluated under the same attack"
        return html.section("Time against accuracy", html.paragraph(reason, "note"))
    plot = parts.plot("time-against-accuracy", lambda: time_figure(points, robust[-1][0]))
    note = "Seconds are those of the machine that trained (below); runs on other machines cannot be compared by them."
    return html.section("Time against accuracy", plot, html.paragraph(note, "note"))


def _by_class(record: Record) -> Mapping[str, Any] | None:
    return next(iter(record.evaluations.values()), None)


def _classes(parts: _Parts) -> Html:
    """Accuracy by class, clean and under each attack at the run's eps."""
    made: list[Html] = []
    for name, record in parts.runs.records.items():
        stored, own = _by_class(record), parts.made.get(name)
        values = stored or (own.evaluation if own else None)
        if not values:
            continue
        eps = record.settings.get("eps") or (own.eps if own else None)
        columns = [each for each in values["attacks"] if each["eps"] is None or abs(each["eps"] - (eps or 0)) < 1e-9]
        names = _class_names(record, own)
        classes = sorted({label for each in columns for label in each["per_class"]}, key=int)
        rows: list[tuple[str, ...]] = [("class", *map(_label, columns))]
        for label in classes:
            shares = [each["per_class"].get(label) for each in columns]
            title = names[int(label)] if names and int(label) < len(names) else label
            rows.append((title, *("" if share is None else f"{100 * share:.1f} %" for share in shares)))
        how = (
            _stored(record, values)
            if stored
            else described(own.eps, own.norm, values["images"], parts.seed)
            if own
            else ""
        )
        made += [html.tag("h3", html.text(name)), html.table(rows), html.paragraph(how, "note")]
    nothing = [] if made else [html.paragraph("left out: no folder holds it, and nothing was measured", "note")]
    return html.section("Accuracy by class", *made, *nothing, parts.missing)


def _class_names(record: Record, own: Measured | None) -> Sequence[str] | None:
    if own and own.class_names:
        return own.class_names
    known = str(record.data.get("name") or record.settings.get("dataset"))
    return data.get(known).class_names if known in data.names() else None


def _gallery(parts: _Parts) -> Html:
    """Image, perturbation and adversary, with what the network says."""
    made: list[Html] = []
    for name, own in parts.made.items():
        if own.gallery:
            names = _class_names(parts.runs.records[name], own)
            fooled = sum(each.attacked[0] != each.label for each in own.gallery)
            told = f"{fooled} of {len(own.gallery)} are classified wrongly after the attack."
            made += [html.tag("h3", html.text(name)), _shown(own, names), html.paragraph(told, "note")]
    if not made:
        return html.section(
            "Adversaries", html.paragraph("left out: none were asked for or could be made", "note"), parts.missing
        )
    first = next(iter(parts.made.values()))
    note = drawn(first.norm, parts.seed)
    return html.section("Adversaries", html.paragraph(note, "note"), *made, parts.missing)


def _shown(own: Measured, names: Sequence[str] | None) -> Html:
    def called(label: int) -> str:
        return names[label] if names and label < len(names) else str(label)

    def said(prediction: tuple[int, float], label: int) -> Html:
        right = prediction[0] == label
        return html.tag(
            "div", html.text(f"{called(prediction[0])}, {100 * prediction[1]:.0f} %"), "" if right else "fooled"
        )

    def cell(pixels: torch.Tensor, what: str, below: Html) -> Html:
        return html.joined([html.image(png(pixels), what, "pixels"), below])

    head = ["", *(f"image {each.number}: {called(each.label)}" for each in own.gallery)]
    rows = [[html.text(each) for each in head]]
    for title, of in {"image": 0, f"perturbation, eps {radius(own.eps, own.norm)}": 1, "adversary": 2}.items():
        row = [html.text(title)]
        for each in own.gallery:
            pixels = (each.image, _change(each, own), each.adversary)[of]
            below = (said(each.clean, each.label), Html(""), said(each.attacked, each.label))[of]
            row.append(cell(pixels, f"{title} {each.number}", below))
        rows.append(row)
    return html.html_table(rows, "gallery")


def _change(each: Attacked, own: Measured) -> torch.Tensor:
    """The perturbation around grey."""
    change = each.adversary - each.image
    most = own.eps if own.norm == "linf" else max(float(change.abs().max()), 1e-12)
    return 0.5 + change / (2 * most)


def _settings(parts: _Parts) -> Html:
    """Command, machine and all settings of each run."""
    made: list[Html] = []
    for name, record in parts.runs.records.items():
        made.append(html.tag("h3", html.text(name)))
        command = record.command or "not stored: the run was not made by `atlas train`, or was moved alone"
        made.append(html.tag("pre", html.text(command)))
        machine = {key: value for key, value in record.environment.items() if value is not None}
        made.append(
            html.folded("environment", html.values(machine))
            if machine
            else html.paragraph("no environment is stored", "note")
        )
        made.append(html.folded("configuration", html.values(dict(record.settings))))
        if record.data:
            made.append(html.folded("data", html.values(dict(record.data))))
    return html.section("Command, environment, configuration", *made)


_SECTIONS = (_figures, _curves, _over_eps, _over_time, _classes, _gallery, _settings)

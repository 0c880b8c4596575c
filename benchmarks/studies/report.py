"""What the rows of the study say: tables, the frontier, and a verdict on each figure that was asked for."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from atlas_train.options import number
from atlas_train.writing import write_text
from speedrun import RECORDS
from studies import judged, plan, rows
from studies.bootstrap import Interval, Verdicts, accuracy, difference
from studies.plan import BEDS, RECIPES
from studies.rows import ROWS, Row
from studies.work import RESULTS, ROOT
from tables import Table, aligned, markdown

PAGE = ROOT / "docs" / "atlas_study.md"
BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HOLDS, FAILS, OPEN, GPU, NOT_RUN = "holds", "does not hold", "undecided", "waits for a GPU", "not run yet"
GPUS = "one H100 or H200"
#: With fewer seeds nothing is decided.
SEEDS = 3
#: The last epoch's weights have less than this share of the robustness of the best ones: a collapse that no sign told.
LOST = 0.5
EPS = ("4/255", "6/255", "8/255", "10/255", "12/255", "14/255", "16/255")
#: The form of ATLAS that is the default on CIFAR-10, at 5 passes.
DEFAULT = "start-constant-w0.1"
EPS_RECIPES = ("start", DEFAULT, "atlas", "adv-1", "n_fgsm", "liet", "adv-2")


@dataclass(frozen=True, order=True)
class Setting:
    """What runs that are compared have in common."""

    bed: str
    epochs: int
    eps: str

    @property
    def words(self) -> str:
        return f"{self.bed}, {self.epochs} epochs, eps {self.eps}"


@dataclass
class Study:
    """The rows and where their verdicts lie."""

    rows: Sequence[Row]
    folder: Path

    @classmethod
    def read(cls, folder: Path = RESULTS) -> Study:
        return cls(rows.read(folder / ROWS), folder)

    def of(self, setting: Setting, recipe: str, judge: str | None = None) -> dict[int, Row]:
        """The rows of a recipe by seed; of a recipe that was changed since, none."""
        found = {}
        for row in self.rows:
            same = (row["bed"], row["epochs"], row["eps"], row["recipe"]) == (*vars(setting).values(), recipe)
            if same and (judge is None or row["judge"] == judge) and row["given"] == _given(setting, recipe, row):
                found[row["seed"]] = row
        return found

    def settings(self, judge: str) -> list[Setting]:
        found = {Setting(row["bed"], row["epochs"], row["eps"]) for row in self.rows if row["judge"] == judge}
        return sorted(found, key=lambda each: (list(BEDS).index(each.bed), number(each.eps), each.epochs))

    def verdicts(self, of: Mapping[int, Row], measure: str) -> dict[int, Verdicts]:
        """Of the rows that were judged, by seed."""
        found = {}
        for seed, row in of.items():
            if row["verdicts"]:
                arrays = _arrays(self.folder / row["verdicts"])
                found[seed] = arrays["ids"], arrays[measure]
        return found

    def difference(
        self, one: tuple[Setting, str], other: tuple[Setting, str], judge: str, measure: str = "aa"
    ) -> Interval | None:
        """Of two recipes, each in its setting."""
        pair = (self.verdicts(self.of(*each, judge), measure) for each in (one, other))
        return difference(*pair)


@cache
def _arrays(path: Path) -> dict[str, np.ndarray]:
    return judged.load(path)


def _given(setting: Setting, recipe: str, row: Row) -> str:
    return plan.Planned(setting.bed, setting.epochs, setting.eps, recipe, row["seed"], row["judge"]).given


def collapsed(row: Row) -> bool:
    """Whether training collapsed: by its signs, or as its last weights have lost the robustness of the best."""
    lost = row["last_aa"] is not None and row["aa"] is not None and row["last_aa"] < LOST * row["aa"]
    return bool(row["collapses"]) or row["aa"] is None or lost


# --- tables


def table(study: Study, setting: Setting, judge: str) -> Table:
    """A line for each recipe: accuracies with the images' interval, what training cost, and the gap to ADV-2."""
    attack = "AA" if judge == "test" else "APGD"
    costs = ["s/epoch", "MiB", "on"]
    lines = [["recipe", "seeds", "passes", "clean", "PGD-20", attack, "over adv-2", "collapsed", *costs]]
    for recipe in RECIPES:
        if own := study.of(setting, recipe, judge):
            lines.append([recipe, str(len(own)), *_cells(study, setting, recipe, judge, own)])
    return lines


def _cells(study: Study, setting: Setting, recipe: str, judge: str, own: Mapping[int, Row]) -> list[str]:
    of = list(own.values())
    cells = [_mean(of, "passes", "{:.1f}")]
    for measure in judged.MEASURES:
        seen = study.verdicts(own, measure)
        cells.append(accuracy(seen).points(sign=False) if seen else "-")
    gap = study.difference((setting, recipe), (setting, "adv-2"), judge) if recipe != "adv-2" else None
    bad = [row for row in of if collapsed(row)]
    cells += [gap.points() if gap else "-", _told(bad, len(of)) if judge == "screen" else "-"]
    cells += [_mean(of, "epoch_seconds", "{:.2f}"), _mean(of, "memory", "{:.0f}", 2**-20)]
    return [*cells, "; ".join(dict.fromkeys(_device(row) for row in of))]


def _told(bad: Sequence[Row], seeds: int) -> str:
    """How many seeds collapsed, in which epoch first, and how that showed."""
    if not bad:
        return f"0 of {seeds}"
    signs = [(row["collapses"] or f"{row['epochs_done'] or '?'}: {row['ended'] or 'the last weights'}") for row in bad]
    first = [sign.partition(": ") for sign in signs]
    kinds = dict.fromkeys(_kind(kind) for _, _, kind in first)
    return f"{len(bad)} of {seeds} (epoch {', '.join(epoch for epoch, _, _ in first)}; {', '.join(kinds)})"


def _kind(sign: str) -> str:
    words = sign.partition(":")[0]
    return {"the network learned its own attack": "own attack", "the network hides from short attacks": "hides"}.get(
        words, "fell" if "fell from" in sign else words
    )


def _device(row: Row) -> str:
    where = row["cpu"] if row["device"] == "cpu" else row["device"]
    return f"{where}, {row['parallel']} beside" if (row["parallel"] or 1) > 1 else where


def _mean(of: Sequence[Row], name: str, form: str, scale: float = 1.0) -> str:
    values = [row[name] for row in of if row[name] is not None]
    return form.format(scale * statistics.fmean(values)) if values else "-"


def frontier(study: Study, setting: Setting, judge: str) -> Table:
    """The recipes that no other beats in both accuracies, by clean accuracy; who beats the rest."""
    points = {}
    for recipe in RECIPES:
        own = study.of(setting, recipe, judge)
        if own and not any(collapsed(row) for row in own.values()):
            points[recipe] = tuple(statistics.fmean(row[name] for row in own.values()) for name in ("clean", "aa"))
    lines = [["recipe", "clean", "AA" if judge == "test" else "APGD", "beaten by"]]
    for recipe, (clean, aa) in sorted(points.items(), key=lambda item: -item[1][0]):
        above = [name for name, (c, a) in points.items() if c >= clean and a >= aa and (c, a) != (clean, aa)]
        lines.append([recipe, f"{100 * clean:.1f}", f"{100 * aa:.1f}", ", ".join(above) or "none: on the frontier"])
    return lines


def eps_table(study: Study, bed: str = "full", epochs: int = 30) -> Table:
    """The field's usual figure: robust accuracy against eps, of the last epoch, in which a collapse shows."""
    lines = [["recipe", *EPS]]
    for recipe in EPS_RECIPES:
        cells = []
        for eps in EPS:
            own = list(study.of(Setting(bed, epochs, eps), recipe, "screen").values())
            last = [0.0 if row["last_aa"] is None else row["last_aa"] for row in own]
            mark = " (collapsed)" if any(collapsed(row) for row in own) else ""
            cells.append(f"{100 * statistics.fmean(last):.1f}{mark}" if last else "-")
        lines.append([recipe, *cells])
    return lines


# --- figures


@dataclass(frozen=True)
class Survives:
    """``one`` does not collapse where one of ``foils`` does."""

    words: str
    setting: Setting
    one: str
    foils: tuple[str, ...]

    def verdict(self, study: Study) -> tuple[str, str]:
        own, others = (
            [study.of(self.setting, name, "screen") for name in names] for names in ((self.one,), self.foils)
        )
        if not own[0] or not any(others):
            return _missing(self.setting), "-"
        counts = {
            name: (sum(map(collapsed, found.values())), len(found))
            for name, found in zip((self.one, *self.foils), [*own, *others], strict=True)
        }
        told = ", ".join(f"{name} {bad} of {seeds}" for name, (bad, seeds) in counts.items() if seeds)
        if counts[self.one][0]:
            return FAILS, told
        falls = any(counts[name][0] for name in self.foils)
        return (HOLDS if falls and counts[self.one][1] >= SEEDS else OPEN), told


@dataclass(frozen=True)
class AtLeast:
    """``one`` is right at least ``margin`` more often than ``other``; at most ``time`` of its training time, if said.

    beside: another measure whose difference is told too. epochs: those of ``other``, if it has its own.
    """

    words: str
    setting: Setting
    one: str
    other: str
    margin: float = 0.0
    measure: str = "aa"
    beside: str | None = None
    time: float | None = None
    epochs: int | None = None

    @property
    def pair(self) -> tuple[tuple[Setting, str], tuple[Setting, str]]:
        other = replace(self.setting, epochs=self.epochs or self.setting.epochs)
        return (self.setting, self.one), (other, self.other)

    def verdict(self, study: Study) -> tuple[str, str]:
        for judge in ("test", "screen"):
            if gap := study.difference(*self.pair, judge, self.measure):
                break
        else:
            return _missing(self.setting), "-"
        told = f"{gap.points()}, {gap.images:,} {'test' if judge == 'test' else 'validation'} images, {gap.seeds} seeds"
        if self.beside and (more := study.difference(*self.pair, judge, self.beside)):
            told += f"; {'AutoAttack' if self.beside == 'aa' else self.beside}: {more.points()}"
        found = HOLDS if gap.low >= self.margin else FAILS if gap.high < self.margin else OPEN
        if self.time is not None:
            share = self._share(study)
            told += f"; time {share:.2f} of it" if share else "; time not known on one device"
            found = OPEN if share is None and found == HOLDS else FAILS if share and share > self.time else found
        return (found if gap.seeds >= SEEDS else OPEN), told

    def _share(self, study: Study) -> float | None:
        """Of the training time, from runs on one device with as many beside them."""
        one, other = (list(study.of(*each).values()) for each in self.pair)
        shares = [
            a["seconds"] / b["seconds"]
            for a in one
            for b in other
            if a["seconds"] and b["seconds"] and _device(a) == _device(b)
        ]
        return statistics.median(shares) if shares else None


Figure = Survives | AtLeast


def _missing(setting: Setting) -> str:
    return GPU if BEDS[setting.bed].needs_gpu else NOT_RUN


def figures() -> Iterator[Figure]:
    """What the study is asked, on a CPU and at full scale."""
    others = Setting("mnist", 10, "0.3"), Setting("digits", 40, "0.2")
    for one, shortest in (("start", 15), (DEFAULT, 21)):
        lasting = [("cpu", n, "16/255") for n in (shortest, 30, 60)]
        lasting += [
            (bed, n, eps) for bed, n in (("half", 30), ("full", 30), ("full", 60)) for eps in ("8/255", "12/255")
        ]
        for setting in (*(Setting(*where) for where in lasting), *others):
            words = "does not collapse where the old default or one-step ADV does"
            yield Survives(words, setting, one, ("atlas", "adv-1"))
    for setting in (Setting("cpu", 15, "16/255"), Setting("full", 30, "8/255")):
        yield AtLeast("at least as robust as ADV-2 (7 passes)", setting, "start", "adv-2")
        yield AtLeast("at least as robust as LIET (7 passes)", setting, "start", "liet")
        yield AtLeast("within 1 point of ADV-10 (23 passes)", setting, "start", "adv-10", -0.01)
        yield AtLeast("at least 2 points above one-step ADV", setting, "start", "adv-1", 0.02)
        yield AtLeast("at least as accurate as ADV-2 on clean images", setting, "start", "adv-2", measure="clean")
    # A tie to a constant, or none, takes the 5 passes of one-step ADV: as many passes in all, so more epochs.
    for bed, epochs, eps, shorter in (("cpu", 21, "16/255", 15), ("full", 42, "8/255", 30)):
        setting, beside = Setting(bed, epochs, eps), f"with as many passes in all ({shorter} epochs)"
        for one in ("start-constant-w0", "start-constant-w0.1", "start-constant-w0.3", "start-constant"):
            yield AtLeast(f"at least as robust as ADV-2 {beside}", setting, one, "adv-2", epochs=shorter)
            words = f"at least 2 points more accurate than ADV-2 on clean images {beside}"
            yield AtLeast(words, setting, one, "adv-2", 0.02, measure="clean", epochs=shorter)
        yield AtLeast(f"at least as robust as LIET {beside}", setting, DEFAULT, "liet", epochs=shorter)
        within = f"within 1 point of ADV-10 (23 passes, {shorter} epochs)"
        yield AtLeast(within, setting, DEFAULT, "adv-10", -0.01, epochs=shorter)
        yield AtLeast("at least 2 points above one-step ADV", setting, DEFAULT, "adv-1", 0.02)
    equal = (("adv-1", "ADV-1", 42), ("n_fgsm", "N-FGSM", 42), ("adv-3", "ADV-3", 23), ("adv-4", "ADV-4", 19))
    for one, length in (("start", 30), (DEFAULT, 42)):
        for other, called, epochs in (*equal, ("adv-10", "ADV-10", 9)):
            words = f"at least as robust as {called} with as many passes in all ({epochs} epochs)"
            yield AtLeast(words, Setting("full", length, "8/255"), one, other, epochs=epochs)
    for setting in others:
        for one in ("start", DEFAULT):
            yield AtLeast("at least as robust as ADV-2", setting, one, "adv-2")
            yield AtLeast("at least as robust as LIET", setting, one, "liet")
    for setting in (Setting("cpu", 15, "16/255"), Setting("full", 30, "8/255")):
        yield AtLeast("(9 passes) at least as robust as ADV-3 (9)", setting, "start-2-steps", "adv-3")
        yield AtLeast("(10 passes) at least as robust as ADV-4 (11)", setting, "start-segment", "adv-4")
        yield AtLeast("ATLAS with 10 steps at least as robust as TRADES-10", setting, "atlas-10-steps", "trades-10")
        yield AtLeast(
            "Backward Smoothing within 1 point of TRADES-10, in at most 40 % of its time",
            setting, "backward_smoothing", "trades-10", -0.01, time=0.4,
        )  # fmt: skip
        yield AtLeast("ADV + ADR above ADV-10", setting, "adr", "adv-10")
        yield AtLeast("GAIRAT above ADV-10 under PGD-20", setting, "gairat", "adv-10", measure="pgd", beside="aa")


def verdicts_table(study: Study) -> Table:
    lines = [["figure", "where", "verdict", "difference in points, or who collapsed"]]
    for figure in figures():
        words = f"`{figure.one}`: {figure.words}" if figure.one.startswith("start") else figure.words
        lines.append([words, figure.setting.words, *figure.verdict(study)])
    for budget, record in RECORDS.items():
        lines.append(
            [f"speedrun: AutoAttack {record.target:g} % in {budget} s", GPUS, *speedrun_verdict(study, budget)]
        )
    return lines


def speedrun_verdict(study: Study, budget: int) -> tuple[str, str]:
    """What the files of ``speedrun.py`` beside the study's folder say; of several GPUs the best."""
    paths = sorted(study.folder.parent.glob(f"NVIDIA*-speedrun-{budget}.json"))
    found = [json.loads(path.read_text(encoding="utf-8"))["verdict"] for path in paths]
    ends = {": reached": HOLDS, ": missed": FAILS, "exceeded": FAILS}
    told = [
        (next((v for end, v in ends.items() if text.endswith(end)), OPEN), text.partition("; ")[2]) for text in found
    ]
    return min(told, key=lambda each: (HOLDS, OPEN, FAILS).index(each[0]), default=(GPU, "-"))


# --- the page


def parts(study: Study) -> dict[str, str]:
    """What the blocks of docs/atlas_study.md hold."""
    return {
        "verdicts": markdown(verdicts_table(study)),
        "eps": markdown(eps_table(study)),
        "tables": _sections(study, table, markdown) or "-",
        "frontier": _sections(study, frontier, markdown) or "-",
        "queue": markdown(queue_table(study)),
    }


def _sections(study: Study, make: object, shown: object) -> str:
    words = {"screen": "validation images", "test": "test images, AutoAttack standard"}
    found = [
        f"{setting.words}; {words[judge]}\n\n{shown(make(study, setting, judge))}"  # type: ignore[operator]
        for judge in ("test", "screen")
        for setting in study.settings(judge)
    ]
    return "\n\n".join(found)


def queue_table(study: Study) -> Table:
    """How much of the queue has been run, bed by bed."""
    done = {(row["name"], row["judge"], row["given"]) for row in study.rows}
    lines = [["bed", "judged by", "runs", "done"]]
    for bed in BEDS:
        for judge in plan.JUDGES:
            own = [each for each in plan.queue() if (each.bed, each.judge) == (bed, judge)]
            if own:
                ended = sum((each.name, each.judge, each.given) in done for each in own)
                by = "validation images" if judge == "screen" else "test images"
                lines.append([bed, by, str(len(own)), str(ended)])
    return lines


def filled(text: str, study: Study) -> str:
    made = parts(study)
    return BLOCK.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n\n{found[3]}", text)


def fill(study: Study) -> None:
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), study))


def told(study: Study) -> Iterable[str]:
    """The same for the terminal."""
    yield aligned(verdicts_table(study))
    for make in (table, frontier):
        if sections := _sections(study, make, aligned):
            yield sections
    yield aligned(queue_table(study))

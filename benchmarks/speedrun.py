"""Time to a robust network: CIFAR-10 trained in a budget of seconds on one GPU, and then attacked by AutoAttack.

    python benchmarks/speedrun.py 60 --data-dir DATA --results speedrun-60.json
    python benchmarks/speedrun.py 60 --data-dir DATA --images 10000      the same networks, on all test images
    python benchmarks/speedrun.py 60 --data-dir DATA --choose --set epochs=30 --runs runs/longer
    python benchmarks/speedrun.py 60 --data-dir DATA --tiny              on a CPU, to see it run

The clock runs from images on the device to a checkpoint on disk. Before it, beside the figure: the start (data,
network) and the warm-up, in which code is compiled and graphs are recorded on random images, and all is put back. In
it: every epoch with its shuffling, augmentation and averaging, and passes for BatchNorm if the settings have some.
After it: AutoAttack. Warmed up and timed as public speed records of standard training are (airbench, for one).

No extra data. Held-out training images are for choosing settings (--choose: APGD-CE and APGD-T on them, and no test
image is looked at); the figure is AutoAttack's, standard, on the first 1,000 test images, a mean over seeds. Every
network is kept, with its clock: the same words go on where a command was stopped, in training or in evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from atlas_train import checkpoint, data, progress
from atlas_train.autoattack import autoattack
from atlas_train.config import TrainConfig, from_dict, recorded
from atlas_train.data import DataSplits, Images, held_out
from atlas_train.engine import TrainStep, train
from atlas_train.evaluate import evaluate
from atlas_train.folders import locked, made
from atlas_train.results import environment
from atlas_train.run import Run
from atlas_train.warm_up import warm_up
from atlas_train.writing import write_json
from harness import synchronise
from tables import Table, aligned, command_line, markdown, write

#: Of every record: FGSM-PGI as an instance of ATLAS, the recipe of the FastAT benchmark where a short run allows it.
#: Momentum stays the same, as another one would be another graph.
COMMON: dict[str, Any] = {
    "dataset": "cifar10", "model": "resnet18", "mean": (), "std": (), "val_size": 0, "probe_size": 0,
    "method": "atlas", "hyper": {"local": "start", "start_noise": "pgi", "local_objective": "logit"},
    "batch_size": 256, "lr": 0.2, "schedule": "cyclic", "cyclic_peak": 0.3, "weight_decay": 5e-4,
    "label_smoothing": 0.4, "averaging": "ema",
    "train_precision": "bf16", "channels_last": True, "compile": True, "cuda_graphs": "step", "cudnn_benchmark": True,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What is aimed at in so many seconds (AutoAttack accuracy, percent), and how."""

    target: float
    settings: Mapping[str, Any]


#: By budget in seconds, on one H100 or H200. The average is over about a twentieth of the batches.
RECORDS = {
    60: Record(45.0, {"epochs": 24, "ema_decay": 0.9956}),
    120: Record(48.0, {"epochs": 48, "ema_decay": 0.9978}),
    300: Record(50.0, {"epochs": 120, "ema_decay": 0.9991}),
}
#: What a CPU ends in a minute.
TINY: dict[str, Any] = {
    "train_size": 2000, "width": 8, "epochs": 2, "train_precision": "fp32", "compile": False, "cuda_graphs": "none",
    "device": "cpu",
}  # fmt: skip
#: Published marks, by their names in ``one_step_published.json``, which names their source.
MARKS = {"liet": "LIET", "n_fgsm": "N-FGSM", "pgd_at_wa": "PGD-10, averaged"}
PUBLISHED = Path(__file__).with_name("one_step_published.json")
CLOCK, Z = "clock.json", 1.96
Row = dict[str, Any]


def settings(budget: int, tiny: bool, given: Sequence[str]) -> TrainConfig:
    """Those of the record; over them the tiny ones, and over these NAME=VALUE."""
    own: dict[str, Any] = {}
    for word in given:
        name, _, text = word.partition("=")
        try:
            own[name] = json.loads(text)
        except ValueError:
            own[name] = text
    return from_dict({**COMMON, **RECORDS[budget].settings, **(TINY if tiny else {}), **own}, "--set")


def split(config: TrainConfig, data_dir: str | None) -> tuple[DataSplits, Images]:
    """The data without the images to choose settings on, and these: the same for every seed."""
    splits = data.load(config.dataset, data_dir)
    count = held_out.default_size(len(splits.train), config.train_size)
    images, others = held_out.split(splits.train, config.train_size, count, seed=0)
    assert others is not None
    return replace(splits, train=images), others


class Told(progress.Silent):
    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)


def trained(config: TrainConfig, splits: DataSplits, folder: Path, budget: float, began: float) -> Row:
    """Trains against the clock; the network, and then what the clock said, are in the folder."""
    marks = [began]

    def mark(device: torch.device) -> None:
        synchronise(device)
        marks.append(time.perf_counter())

    def start(run: Run, train_step: TrainStep) -> None:
        mark(run.device)
        warm_up(run, train_step)
        mark(run.device)

    def foretell(row: Mapping[str, Any]) -> None:
        seconds = (time.perf_counter() - marks[-1]) * config.epochs
        if row["epoch"] == 1 and seconds > budget:
            fit = int(config.epochs * budget / seconds)
            few = f"{fit} of {config.epochs} epochs fit (--set epochs={fit})" if fit else "not one epoch fits"
            print(f"  it will take about {seconds:.3g} s, and the budget is {budget:g}: {few}", flush=True)

    run = train(config, splits=splits, display=Told(), on_start=start, on_epoch=foretell)
    state = {"config": recorded(run.config), "arch": run.arch, "model": run.final_model.state_dict()}
    checkpoint.save(folder / checkpoint.LAST, state)
    mark(run.device)
    seconds = dict(zip(("start", "warm_up", "training"), (b - a for a, b in pairwise(marks)), strict=True))
    row = {
        "seed": config.seed,
        "seconds": seconds,
        "over": seconds["training"] > budget,
        "epochs": run.epoch,
        "train_images": len(run.splits.train),
        "peak_memory": run.peak_memory or None,
        "settings": recorded(run.config),
        "asked": recorded(config),
        "weights": checkpoint.fingerprint(run.final_model),
        "environment": environment(run.device, torch.get_num_threads()),
    }
    write_json(folder / CLOCK, row)
    return row


def attacked(row: Row, folder: Path, images: Images, name: str, version: str) -> Row:
    """Accuracies of a kept network on these images. An evaluation that is there already is not made again."""
    path = folder / f"{name}-{len(images)}-{version}.json"
    if path.exists() and (kept := json.loads(path.read_text()))["weights"] == row["weights"]:
        return kept
    config, device = from_dict(row["settings"], str(folder / CLOCK)), row["settings"]["device"]
    model = checkpoint.load_model(folder / checkpoint.LAST)[0].to(device)
    if checkpoint.fingerprint(model) != row["weights"]:
        raise ValueError(f"{folder / checkpoint.LAST} is not the network that {CLOCK} beside it tells of: remove both")
    seen = evaluate(model, images, config.eps, size=len(images))
    found = autoattack(model, images, config.eps, len(images), version=version, say=print)  # type: ignore[arg-type]
    result = {"weights": row["weights"], "images": name, "count": len(images), "version": version,
              "clean": seen.clean, "pgd": seen.pgd, "aa": found.accuracy, "seconds": found.seconds}  # fmt: skip
    write_json(path, result)
    return result


def kept(folder: Path, config: TrainConfig) -> Row | None:
    """What the clock said of a run that is there. Raises ValueError for one with other settings."""
    if not (folder / CLOCK).exists():
        return None
    row: Row = json.loads((folder / CLOCK).read_text())
    asked = json.loads(json.dumps(recorded(config)))
    if other := [f"{name} {row['asked'].get(name)}, now {value}" for name, value in asked.items()
                 if row["asked"].get(name) != value]:  # fmt: skip
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(other)}): choose another --runs")
    return row


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson for an accuracy on so many images. All seeds see the same ones, so that more seeds
    make it no narrower."""
    middle, spread = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    return tuple((middle + side * spread) / (1 + Z**2 / count) for side in (-1, 1))  # type: ignore[return-value]


def table(rows: Sequence[Row]) -> Table:
    """A line for each seed, and their mean."""
    lines = [["seed", "training s", "start s", "warm-up s", "clean", "PGD-20", "AA", "images"]]
    cells = []
    for row in rows:
        numbers = [row["seconds"][name] for name in ("training", "start", "warm_up")]
        found = row.get("found")
        cells.append([*numbers, *((100 * found[name] if found else math.nan) for name in ("clean", "pgd", "aa"))])
        images = f"{found['count']:,} {found['images']}, {found['version']}" if found else "-"
        lines.append([str(row["seed"]) + (" (over)" if row["over"] else ""), *map(_shown, cells[-1]), images])
    return [*lines, ["mean", *(_shown(statistics.fmean(column)) for column in zip(*cells, strict=True)), ""]]


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def verdict(budget: int, rows: Sequence[Row], seeds: int) -> str:
    """Target and figure: reached where the mean is no lower, and no run was longer than the budget."""
    target, slowest = RECORDS[budget].target, max(row["seconds"]["training"] for row in rows)
    said = f"target: AA {target:g} % in {budget} s; "
    if len(rows) < seeds or not all("found" in row for row in rows):
        return f"{said}{len(rows)} of {seeds} networks trained, {sum('found' in row for row in rows)} attacked"
    found = rows[0]["found"]
    share = statistics.fmean(row["found"]["aa"] for row in rows)
    low, high = interval(share, found["count"])
    figure = f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f}, 95 %), slowest run {slowest:.1f} s"
    if found["images"] != "test" or found["version"] != "standard":
        return f"{said}{found['version']} on {found['images']} images {figure}: not the figure of the record"
    if 100 * share < target:
        return f"{said}{figure}: missed"
    return f"{said}{figure}: {'reached' if slowest <= budget else 'the accuracy is reached, the time is exceeded'}"


def marks() -> Table:
    """Published figures beside ours."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["methods"]
    lines = [["published (GPU not named)", "AA, 10,000 images", "minutes"]]
    for name, title in MARKS.items():
        lines.append([title, f"{published[name]['cifar10']['aa']:.2f}", f"{published[name]['cifar10']['minutes']:.1f}"])
    return lines


def report(o: argparse.Namespace, config: TrainConfig, rows: Sequence[Row], command: str) -> None:
    """Writes what there is so far."""
    parts, said = [table(rows), marks()], verdict(o.budget, rows, len({*o.seeds}))
    if o.results:
        values = {"budget": o.budget, "target": RECORDS[o.budget].target, "verdict": said, "rows": rows}
        how = ", ".join(f"{name} {value}" for name, value in sorted(_own(config).items()))
        write(o.results, f"Speedrun: {o.budget} s", command, values, [*map(markdown, parts), said, f"Settings: {how}."])
    print("\n" + "\n\n".join([*map(aligned, parts), said]) + "\n", flush=True)


def _own(config: TrainConfig) -> Mapping[str, Any]:
    """The settings that are not the trainer's defaults."""
    defaults = recorded(TrainConfig())
    return {name: value for name, value in recorded(config).items() if value != defaults[name] and name != "seed"}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budget", type=int, choices=RECORDS, help="seconds")
    parser.add_argument("--data-dir", help="folder with the data's files")
    parser.add_argument("--runs", type=Path, default=Path("runs/speedrun"), help="networks; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--images", type=int, default=1000, help="the first so many test images; default: %(default)s")
    parser.add_argument("--choose", action="store_true", help="APGD on the held-out images, to choose settings by")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of the trainer")
    parser.add_argument("--tiny", action="store_true", help="2,000 images, width 8, two epochs, on a CPU")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="written as it comes, the tables as .md")
    o = parser.parse_args(arguments)
    if not o.tiny and not torch.cuda.is_available():
        parser.error("a budget is of a GPU, and torch sees no CUDA device here: --tiny runs a small form on a CPU")
    try:
        _run(o, settings(o.budget, o.tiny, o.set), command_line(__file__, arguments), began)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def _run(o: argparse.Namespace, config: TrainConfig, command: str, began: float) -> None:
    """Trains all networks that are not there, then attacks them, and reports after each."""
    splits, others = split(config, o.data_dir)
    name, version = ("validation", "apgd") if o.choose else ("test", "standard")
    images = others if o.choose else splits.test.subset(min(o.images, len(splits.test)))
    folders = {seed: o.runs / str(o.budget) / f"seed-{seed}" for seed in o.seeds}
    rows: dict[int, Row] = {}
    for seed, folder in folders.items():
        own = replace(config, seed=seed)
        with made(folder), locked(folder):
            if row := kept(folder, own):
                print(f"seed {seed}: trained before, in {folder}")
            else:
                print(f"seed {seed}: {config.epochs} epochs", flush=True)
                row = trained(own, splits, folder, o.budget, began)
                took = f"  {row['seconds']['training']:.1f} s"
                print(took + (f": over the budget of {o.budget} s" if row["over"] else ""), flush=True)
        rows[seed], began = row, time.perf_counter()
        report(o, config, list(rows.values()), command)
    for seed, folder in folders.items():
        rows[seed] = rows[seed] | {"found": attacked(rows[seed], folder, images, name, version)}
        report(o, config, list(rows.values()), command)


if __name__ == "__main__":
    main()

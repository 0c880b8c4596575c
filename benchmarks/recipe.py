"""What each option of a modern recipe gains on reduced CIFAR-10: one table, several seeds, intervals.

    python benchmarks/recipe.py --data-dir DATA --results recipe.jsonl [--parallel 4] [--limit-s 240]
    python benchmarks/recipe.py --results recipe.jsonl --table
    python benchmarks/recipe.py --study ema --data-dir DATA --results ema.jsonl

The second study is of EMA alone: after three epochs its weights beside those in training.

Every run is the base with one option changed. Its row is written when it ends, and is not made again: stop the command
when you like, and go on with the same words. Runs go seed by seed, the options in the order of `OPTIONS`; with
`--parallel` several share the device. A gain is that over the base of the same seed; beside its mean stands the 95 %
interval of Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from atlas_train import data
from atlas_train.config import TrainConfig
from atlas_train.engine import train
from atlas_train.evaluate import evaluate
from atlas_train.imported import without_place
from atlas_train.peak_memory import of_training
from atlas_train.results import environment
from atlas_train.writing import write_text
from tables import Table, aligned, markdown
from worker import commit_here, set_up, splits_of

#: Of every run. The published batch of 128 leaves 78 updates an epoch.
BASE: dict[str, Any] = {
    "method": "atlas", "dataset": "cifar10", "train_size": 10000, "epochs": 10, "batch_size": 128, "probe_size": 0,
    "val_size": 0, "train_precision": "bf16", "channels_last": True,
}  # fmt: skip
#: Files that a run makes for itself before it begins: see ``files``.
MADE = "made"
#: What each option sets, those most asked for first.
OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "EMA 0.999 with warm-up": {"averaging": "ema"},
    "extra data, half of a batch": {"extra_data": MADE},
    "ResNet-18": {"model": "resnet18"},
    "SiLU": {"activation": "silu"},
    "mixup 1.4": {"mixup": 1.4},
    "CutMix 1": {"cutmix": 1.0},
    "wide start": {"hyper": {"wide_start": 2.0}},
    "decay not of norms and biases": {"decay_norms": False},
    "eps warm-up, 3 epochs": {"eps_warmup": 3},
    "a tenth of the batches by PGD-10": {"mix_share": 0.1},
    "SWA": {"averaging": "swa"},
    "CutMix 1, EMA": {"cutmix": 1.0, "averaging": "ema"},
    "GELU": {"activation": "gelu"},
    "one_cycle": {"schedule": "one_cycle"},
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "cosine, lr warm-up, 1 epoch": {"schedule": "cosine", "lr_warmup": 1},
    "clip norm 1": {"clip_norm": 1.0},
    "SWA, BatchNorm on clean images": {"averaging": "swa", "average_bn": "clean"},
    "SWA, BatchNorm on adversaries": {"averaging": "swa", "average_bn": "method"},
    "EMA 0.999 without warm-up": {"averaging": "ema", "ema_warmup": False},
    "batches of 512, lr x 4": {"batch_size": 512, "lr": 0.8},
    "batches of 1024, lr x 8": {"batch_size": 1024, "lr": 1.6},
    "fine-tuned, lr / 4, from standard training": {"init": MADE, "lr": 0.05},
}
SCHEDULES = {"lr going to 0": {"schedule": "cosine"}, "lr constant": {"schedule": "constant"}}
WARMUPS = {"EMA 0.999 with warm-up": {"ema_warmup": True}, "without": {"ema_warmup": False}}
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "recipe": OPTIONS,
    "ema": {
        f"{schedule}, {warmup}": {"averaging": "ema"} | changed | how
        for schedule, changed in SCHEDULES.items()
        for warmup, how in WARMUPS.items()
    },
}
#: The 97.5 % point of Student's t for so many runs.
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
ACCURACIES = {"clean": "clean", "pgd": "PGD-20"}
Row = dict[str, Any]


def outcome(named: Row, base: Row, data_dir: str | None, size: int) -> Row:
    """A run, and what came of it; of an average also what came of the weights in training."""
    config = TrainConfig(**base | named["changed"], seed=named["seed"])
    splits = splits_of(config.dataset, data_dir)
    with TemporaryDirectory() as folder:
        run = train(replace(config, **files(config, splits, Path(folder))), splits=splits)

    def accuracies(network: nn.Module) -> Row:
        seen = evaluate(network, splits.test, run.config.eps, size=size, channels_last=config.channels_last)
        return {name: getattr(seen, name) for name in ACCURACIES}

    machine = environment(run.device, torch.get_num_threads()) | {"commit": commit_here()}
    return {
        **named,
        **accuracies(run.final_model),
        **({"raw": accuracies(run.model)} if run.average else {}),
        "images": min(size, len(splits.test)),
        "loss": run.history[-1]["loss"],
        "epoch_seconds": run.seconds / run.epoch,
        "memory": of_training(run),
        "environment": {name: machine[name] for name in ("date", "commit", "torch", "device", "cpu")},
    }


def files(config: TrainConfig, splits: data.DataSplits, folder: Path) -> dict[str, str]:
    """What the run reads: as extra data the training images that the reduced set leaves out, which are real ones, more
    than generated ones can give; as first weights those of standard training, as long as the run itself."""
    made = {}
    if config.extra_data == MADE:
        left_out = _left_out(splits.train, config)
        np.savez(folder / "extra.npz", image=left_out.images.permute(0, 2, 3, 1).numpy(), label=left_out.labels.numpy())
        made["extra_data"] = str(folder / "extra.npz")
    if config.init == MADE:
        standard = replace(config, init=None, method="standard", hyper={}, lr=None)
        train(standard, splits=splits, folder=folder / "standard")
        made["init"] = str(folder / "standard")
    return made


def _left_out(images: data.Images, config: TrainConfig) -> data.Images:
    """The images that the run does not train on otherwise."""
    kept = images if config.train_size is None else images.subset(config.train_size, config.seed)
    known = {image.tobytes() for image in kept.images.numpy()}
    rows = torch.tensor([image.tobytes() not in known for image in images.images.numpy()])
    if not rows.any():
        raise ValueError(f"no image is left out as extra data: set train_size to less than {len(images):,}")
    return data.Images(images.images[rows], images.labels[rows])


def queue(study: str, base: Row, wanted: Sequence[str], seeds: int, done: Sequence[Row]) -> Iterator[Row]:
    """The runs that have no row yet, by what names them: of code of your own without the folder where it lies."""
    base = base | {"dataset": without_place(base["dataset"])}
    for seed in range(seeds):
        for option in wanted:
            named = {"study": study, "option": option, "changed": STUDIES[study][option], "base": base, "seed": seed}
            if not any(all(row.get(name) == value for name, value in named.items()) for row in done):
                yield named


def read(path: Path) -> list[Row]:
    """The rows so far; of a command that was cut off the last line may be half a row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"a line of {path} is no row, and is left out: {line[:60]}", file=sys.stderr)
    return rows


def append(path: Path, row: Row) -> None:
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut_off + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_all(runs: Iterator[Row], base: Row, path: Path, o: argparse.Namespace) -> None:
    """Makes the runs, ``o.parallel`` at a time, and begins none that would not end within ``o.limit_s``."""
    started, longest = time.monotonic(), 0.0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(o.parallel, context, set_up, (o.threads,)) as pool:
        under_way: dict[Future[Row], tuple[str, float]] = {}
        while True:
            while len(under_way) < o.parallel and time.monotonic() - started + 1.2 * longest < o.limit_s:
                if (following := next(runs, None)) is None:
                    break
                begun = pool.submit(outcome, following, base, o.data_dir, o.eval_size)
                under_way[begun] = following["option"], time.monotonic()
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                option, begin = under_way.pop(future)
                longest = max(longest, time.monotonic() - begin)
                try:
                    row = future.result()
                except Exception as error:  # the others go on
                    print(f"{option}: no row: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                append(path, row)
                accuracies = ", ".join(f"{name} {100 * row[key]:.1f}" for key, name in ACCURACIES.items())
                print(f"{time.monotonic() - started:5.0f} s  {option}, seed {row['seed']}: {accuracies}", flush=True)


def tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """A table for each study, base and device, and its title."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        base = ", ".join(f"{name} {value}" for name, value in row["base"].items() if value not in (None, []))
        where = f"{row['environment']['device']}, commit {row['environment']['commit']}"
        groups[f"{row['study']}: {base}; {row['images']} test images; {where}"].append(row)
    make = {"recipe": gains_table, "ema": ema_table}
    return [(words, make[group[0]["study"]](group)) for words, group in groups.items()]


def gains_table(rows: Sequence[Row]) -> Table:
    by_option = _by_option(rows)
    base = by_option.get("base", {})
    memory = any(row.get("memory") for row in rows)  # not of earlier versions
    lines = [["option", "seeds", *(cell for name in ACCURACIES.values() for cell in (name, "gain")), "s/epoch"]]
    lines[0] += ["MiB"] * memory
    for option, own in by_option.items():
        cells = [option, str(len(own))]
        for key in ACCURACIES:
            gains = [own[seed][key] - base[seed][key] for seed in own.keys() & base.keys()]
            cells += [percent(row[key] for row in own.values()), "" if option == "base" else interval(gains)]
        cells += [f"{statistics.median(row['epoch_seconds'] for row in own.values()):.2f}"]
        peaks = [row["memory"] for row in own.values() if row.get("memory")]
        lines.append([*cells, *([f"{max(peaks) / 2**20:.0f}" if peaks else "-"] if memory else [])])
    return lines


def ema_table(rows: Sequence[Row]) -> Table:
    lines = [["", "seeds", *(cell for name in ACCURACIES.values() for cell in (f"{name}: raw", "EMA", "gain"))]]
    for option, own in _by_option(rows).items():
        cells = [option, str(len(own))]
        for key in ACCURACIES:
            gains = [row[key] - row["raw"][key] for row in own.values()]
            cells += [percent(row["raw"][key] for row in own.values()), percent(row[key] for row in own.values())]
            cells += [interval(gains)]
        lines.append(cells)
    return lines


def _by_option(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """The rows by option, in the order of the study, and seed."""
    options = STUDIES[rows[0]["study"]]
    found = {option: {row["seed"]: row for row in rows if row["option"] == option} for option in options}
    return {option: own for option, own in found.items() if own}


def percent(shares: Iterable[float]) -> str:
    return f"{100 * statistics.mean(shares):.1f}"


def interval(gains: Sequence[float]) -> str:
    """The mean in points, with the 95 % interval where there are several."""
    if not gains:
        return "-"
    mean = f"{100 * statistics.mean(gains):+.1f}"
    if len(gains) == 1:
        return mean
    return f"{mean} ± {100 * T[min(len(gains), max(T))] * statistics.stdev(gains) / math.sqrt(len(gains)):.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each option of a recipe gains on reduced CIFAR-10.")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE.jsonl", help="rows; beside it the table")
    parser.add_argument("--study", default="recipe", choices=STUDIES, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="only the table of the rows that are there")
    parser.add_argument("--data-dir", help="folder with the data's files")
    parser.add_argument("--options", nargs="+", metavar="NAME", help="these alone (and the base)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; default: %(default)s")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="begin no run that would not end by then")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of a run")
    parser.add_argument("--eval-size", type=int, default=2000, help="test images; default: %(default)s")
    parser.add_argument("--base", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of every run")
    o = parser.parse_args(arguments)
    if not o.table:
        options = STUDIES[o.study]
        if unknown := set(o.options or ()) - options.keys():
            parser.error(f"--options: no {', '.join(unknown)} (known: {', '.join(options)})")
        wanted = [name for name in options if name == "base" or not o.options or name in o.options]
        base = _base(o)
        run_all(queue(o.study, base, wanted, o.seeds, read(o.results)), base, o.results, o)
    made = tables(read(o.results))
    for words, lines in made:
        print(f"\n{words}\n\n{aligned(lines)}")
    parts = [f"{words}\n\n{markdown(lines)}" for words, lines in made]
    write_text(o.results.with_suffix(".md"), "\n\n".join(["# What each option gains", *parts]) + "\n")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _base(o: argparse.Namespace) -> Row:
    """The settings of every run, as a row has them."""
    own = {name: _value(text) for name, text in (each.split("=", 1) for each in o.base)}
    unknown = own.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise SystemExit(f"--base: no setting {', '.join(sorted(unknown))}: `atlas train --help` lists them")
    cuda = str(own.get("device", "cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    graphs = {"cuda_graphs": "step"} if cuda else {}
    return BASE | ({"epochs": 3} if o.study == "ema" else {}) | graphs | own


if __name__ == "__main__":
    main()
